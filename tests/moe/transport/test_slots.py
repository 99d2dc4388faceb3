"""The MoE layer with constant sizes: against the ordinary layer with the same capacity, and
where rows go between ranks.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support.numeric import LayerObjective, close, integers, no_noise, tensor
from support.small import small_config

from pangu_locmoe.config import CapacityConfig
from pangu_locmoe.moe.capacity import DROPLESS, factor_capacity
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.layer import MoELayer
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.moe.slot_sizes import certain_drops, group_slots, source_slots
from pangu_locmoe.moe.transport import slots
from pangu_locmoe.moe.transport.slots import SlotExchange
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.topology import Topology

TOKENS = 32
HIDDEN = 16
EXPERTS = 4
RANDOM = np.random.default_rng(3)
X_TD = RANDOM.standard_normal((TOKENS, HIDDEN))
SENS_TD = RANDOM.standard_normal((TOKENS, HIDDEN))
TOKENS_T = RANDOM.integers(0, 300, TOKENS)
DOMAINS_T = np.repeat([0, 1], TOKENS // 2)


def with_factors(local: float, remote: float, **moe):
    """A configuration with static factors; expert_parallel is 2 to be valid, what counts here is
    the topology.
    """
    return small_config(
        moe={"capacity": {"local_factor": local, "remote_factor": remote}, **moe},
        parallel={"expert_parallel": 2, "sizes": "static"},
    )


def one_source(config):
    """The static layer of a world of one, and the ordinary one."""
    allowed_JE = allowed_experts(config)
    context = RouterContext(
        0, allowed_JE, Topology(1, 1, 1, EXPERTS), np.ones((len(allowed_JE), 300), np.int64)
    )
    return MoELayer.of(config, context, Exchange(SingleProcess(), [0], [0])), MoELayer.of(
        config, context
    )


@pytest.mark.parametrize("router", ["hash", "switch", "locmoe"])
@pytest.mark.parametrize("factor", [0.5, 1.25, 4.0], ids=["drops", "some", "roomy"])
@pytest.mark.parametrize("order", ["affinity", "position"])
def test_one_source_is_the_ordinary_layer(router, factor, order):
    config = small_config(
        moe={
            "router": router,
            "z_loss": 0.1,
            "capacity": {"local_factor": factor, "remote_factor": 0.1, "drop_order": order},
        },
        parallel={"expert_parallel": 2, "sizes": "static"},
    )
    layer, ordinary = one_source(config)
    capacity = factor_capacity(factor, TOKENS, EXPERTS)
    results = []
    for cell in (layer, ordinary):
        y_TD, stats = cell(
            tensor(X_TD),
            integers(TOKENS_T),
            integers(DOMAINS_T),
            no_noise(TOKENS, HIDDEN),
            capacity,
            True,
        )
        weights = ms.ParameterTuple(cell.trainable_params())
        value, (dx_TD, dweights) = ms.value_and_grad(
            LayerObjective(cell, capacity, SENS_TD), 0, weights
        )(tensor(X_TD), integers(TOKENS_T), integers(DOMAINS_T))
        results.append(([y_TD, value, dx_TD, *dweights], stats))
    (got, got_stats), (wanted, wanted_stats) = results
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted):
        close(mine, theirs.asnumpy(), 2e-6)
    assert got_stats.keys() == wanted_stats.keys()
    for name in wanted_stats:
        close(got_stats[name], wanted_stats[name].asnumpy(), 2e-6)


def test_recomputed_experts_have_the_same_gradients():
    """`train.recompute` recomputes the experts of a static layer and not its exchange."""
    found = []
    for layer in one_source(with_factors(1.25, 1.25))[0], one_source(with_factors(1.25, 1.25))[0]:
        if found:
            layer.experts.recompute()
        weights = ms.ParameterTuple(layer.trainable_params())
        value, (dx_TD, dweights) = ms.value_and_grad(
            LayerObjective(layer, DROPLESS, SENS_TD), 0, weights
        )(tensor(X_TD), integers(TOKENS_T), integers(DOMAINS_T))
        found.append([value, dx_TD, *dweights])
    for mine, theirs in zip(*found):
        close(mine, theirs.asnumpy(), 1e-6)


def test_the_compiled_layer_equals_the_uncompiled_one(monkeypatch):
    monkeypatch.setattr(slots, "_mover", lambda exchange, matrix_RR, features: nn.Identity())
    monkeypatch.setattr(slots, "_gather", lambda exchange: Row())
    layer, _ = one_source(with_factors(1.0, 1.0, router="switch", z_loss=0.1))
    weights = ms.ParameterTuple(layer.trainable_params())
    function = ms.value_and_grad(LayerObjective(layer, 8, SENS_TD), 0, weights)
    inputs = (tensor(X_TD), integers(TOKENS_T), integers(DOMAINS_T))
    for compiled, plain in zip(_flat(ms.jit(function)(*inputs)), _flat(function(*inputs))):
        close(compiled, plain.asnumpy(), 2e-6)


class Row(nn.Cell):
    """The gather of a world of one, in a compiled graph."""

    def construct(self, x_M):
        return ops.expand_dims(x_M, 0)


def _flat(result):
    value, (dx_TD, dweights) = result
    return [value, dx_TD, *dweights]


def test_evaluation_drops_nothing():
    layer, ordinary = one_source(with_factors(0.25, 0.25))
    inputs = (
        tensor(X_TD),
        integers(TOKENS_T),
        integers(DOMAINS_T),
        no_noise(TOKENS, HIDDEN),
        DROPLESS,
        False,
    )
    close(layer(*inputs)[0], ordinary(*inputs)[0].asnumpy(), 2e-6)


def test_slots_are_fewer_for_remote_experts():
    topology = Topology(num_ranks=8, ranks_per_node=2, expert_parallel=4, num_experts=8)
    capacity = CapacityConfig(local_factor=2.0, remote_factor=0.25)
    assert (
        source_slots(capacity, topology, 5, 64).tolist() == [16] * 4 + [2] * 4
    )  # ranks 4 to 7 are a group, 4 and 5 a node
    slots_RE = group_slots(capacity, topology, 5, 64)
    assert slots_RE.tolist() == [[16] * 4 + [2] * 4] * 2 + [[2] * 4 + [16] * 4] * 2
    # Never more slots for one expert than there are tokens, never none.
    assert set(
        source_slots(
            CapacityConfig(local_factor=99.0, remote_factor=0.001), topology, 0, 64
        ).tolist()
    ) == {64, 1}


@pytest.mark.parametrize(
    "topology", [Topology(4, 2, 4, 8), Topology(3, 1, 3, 3), Topology(6, 3, 6, 12)], ids=str
)
def test_every_row_reaches_its_expert_and_comes_back(topology):
    """The rows of all ranks, moved between them by NumPy."""
    slots_RE = group_slots(CapacityConfig(local_factor=1.5, remote_factor=0.5), topology, 0, 24)
    size = topology.num_ranks
    held = topology.experts_per_rank
    rows = [
        np.array(
            [
                [source, expert, slot]
                for expert in range(topology.num_experts)
                for slot in range(slots_RE[source, expert])
            ],
            np.float32,
        )
        for source in range(size)
    ]
    exchanges = []
    arrived = []
    for rank in range(size):
        exchange = Exchange(SingleProcess(), [0], [0], False)
        exchange.ranks = list(range(size))
        exchange.position = rank
        exchanges.append(SlotExchange(exchange, slots_RE, 3))
        mine = np.concatenate(
            [part[np.isin(part[:, 1], list(topology.experts_of_rank(rank)))] for part in rows]
        )
        exchanges[-1].there = Constant(mine)
        arrived.append(exchanges[-1].to_experts(tensor(rows[rank])).asnumpy())
        assert exchanges[-1].slots == len(rows[rank])
        assert arrived[-1].shape == (held, len(mine) // held, 3)
        for group, expert in enumerate(topology.experts_of_rank(rank)):
            assert set(arrived[-1][group][:, 1]) == {expert}
        assert sorted(map(tuple, arrived[-1].reshape(-1, 3).tolist())) == sorted(
            map(tuple, mine.tolist())
        )
        sent_back = Recorder()
        exchanges[-1].back = sent_back
        exchanges[-1].from_experts(tensor(arrived[-1]))
        np.testing.assert_array_equal(sent_back.rows, mine)


class Constant(nn.Cell):
    def __init__(self, rows):
        super().__init__()
        self.rows = tensor(rows)

    def construct(self, rows):
        return self.rows


class Recorder(nn.Cell):
    def construct(self, rows):
        self.rows = rows.asnumpy()
        return rows


def test_settings_that_must_drop_are_said():
    topology = Topology(num_ranks=16, ranks_per_node=8, expert_parallel=16, num_experts=16)

    def said(local, remote):
        return list(certain_drops(with_factors(local, remote), topology, 0, 160))

    assert said(2.0, 0.25) == []
    assert said(1.25, 1.25) == [
        (
            "if all tokens stay in their node, 35% are dropped: moe.capacity.local_factor "
            "would have to be 2"
        )
    ]
    assert said(1.0, 0.5) == ["a rank has 120 slots for 160 tokens: at least 25% are dropped"]


def test_bytes_between_nodes_follow_the_remote_factor():
    topology = Topology(num_ranks=16, ranks_per_node=8, expert_parallel=16, num_experts=16)
    rows = [
        int(
            source_slots(CapacityConfig(local_factor=2.0, remote_factor=factor), topology, 0, 1024)[
                8:
            ].sum()
        )
        for factor in (1.0, 0.25)
    ]
    assert rows == [512, 128]


def test_tensors_are_constants():
    """What the graph takes for constants must not be parameters."""
    layer, _ = one_source(with_factors(1.0, 1.0))
    assert isinstance(layer.transport.trained.layout_2E, Tensor)
    assert {parameter.name.rpartition(".")[2] for parameter in layer.get_parameters()} == {
        "w_in",
        "w_out",
    }
