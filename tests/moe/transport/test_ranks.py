"""A layer on several ranks is the layer of one process, for every router and transport: outputs,
losses, gradients.

All ranks are in this process. Each holds all experts, so that only what they share travels; rows
that do are in tests/distributed. The locality loss still has experts of other nodes: its target is
the router's.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from support.numeric import close, integers, no_noise, tensor
from support.small import small_config

from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.experts import Experts, expert_weights
from pangu_locmoe.moe.layer import MoELayer
from pangu_locmoe.moe.plan import LOSSES
from pangu_locmoe.moe.routers import ROUTERS, router_class
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.moe.transport import CountsTransport, LocalTransport, SlotsTransport
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.tensor import TensorGroup
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.step import Objective

REPLICAS = 4  # tokens of a replica
NODES = 2
TOKENS = 8
HIDDEN = 16
EXPERTS = 4
WEIGHTS = {"balance_loss": 1.0, "locality_loss": 0.7, "z_loss": 0.3}
RANDOM = np.random.default_rng(41)
X_TD, SENS_TD = RANDOM.standard_normal((2, REPLICAS * TOKENS, HIDDEN))
X_TD[: REPLICAS * TOKENS // NODES, 4:8] += 1.0  # nodes prefer different experts
TOKENS_T = RANDOM.integers(0, 300, REPLICAS * TOKENS)
DOMAINS_T = np.repeat([0, 1], REPLICAS * TOKENS // 2)
OWN = ["OwnLosses", "Unbalanced", "OneOwnLoss", "Spread", "Bare"]


class Rank(SingleProcess):
    """One of several; `everyones` is what all ranks say when they gather, None while they are
    asked for it.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.said = None
        self.everyones = None

    def all_gather(self, x: Tensor) -> Tensor:
        self.said = x.asnumpy()
        return Tensor(
            np.stack([self.said] * self.size if self.everyones is None else self.everyones)
        )


def config_of(router: str):
    name = router if router in ROUTERS else f"support.own_routers:{router}"
    return small_config(
        moe={
            "router": name,
            "z_loss": 0.1,
            "capacity": {"local_factor": 4.0, "remote_factor": 4.0},
        },
        parallel={"expert_parallel": 2, "sizes": "static"},
        train={"batch_size": 4},
    )


def layer_of(config, transport, communicator=None):
    """The layer with a transport; its router's experts are spread over the nodes, whoever
    computes them.
    """
    allowed_JE = allowed_experts(config)
    topology = Topology(REPLICAS, REPLICAS // NODES, REPLICAS, EXPERTS)
    if transport is LocalTransport:
        topology = Topology.emulated(NODES, EXPERTS)
    context = RouterContext(0, allowed_JE, topology, np.ones((len(allowed_JE), 300), np.int64))
    experts = Experts(*expert_weights(config, 0, range(EXPERTS)), TensorGroup.alone())
    router = router_class(config)(config, context)
    if communicator is None:
        return MoELayer(router, transport(config, Topology(NODES, 1, 1, EXPERTS)), experts)
    replicas = communicator.size // REPLICAS
    own = Topology(communicator.size, communicator.size // NODES, 1, EXPERTS, replicas)
    exchange = Exchange(communicator, [communicator.rank], [0])
    return MoELayer(router, transport(config, own, exchange), experts)


def outcome(layer, part=slice(None), jit=False):
    """y_TD, stats, the gradient by x_TD and by each weight, of the output and all losses; the
    job's is a mean over replicas.
    """
    tokens = TOKENS_T[part].size
    weights = ms.ParameterTuple(layer.trainable_params())
    scale = REPLICAS * TOKENS / tokens
    if jit:
        layer.compile_parts()

    def objective(x_TD):
        keys = no_noise(tokens, HIDDEN)
        y_TD, stats = layer(
            x_TD, integers(TOKENS_T[part]), integers(DOMAINS_T[part]), keys, DROPLESS, True
        )
        total = ops.reduce_sum(y_TD * tensor(SENS_TD[part])) * scale
        for name, weight in WEIGHTS.items():
            total = total + weight * stats[name]
        return total, y_TD, stats

    (_, y_TD, stats), (dx_TD, dweights) = ms.value_and_grad(objective, 0, weights, has_aux=True)(
        tensor(X_TD[part])
    )
    named = {weight.name: d.asnumpy() for weight, d in zip(weights, dweights)}
    return (
        y_TD.asnumpy(),
        {name: value.asnumpy() for name, value in stats.items()},
        dx_TD.asnumpy(),
        named,
    )


@pytest.fixture
def registered():
    before = dict(ROUTERS)
    yield
    for name in set(ROUTERS) - set(before):
        del ROUTERS[name], ROUTER_TRAITS[name]


def assert_ranks_are_one_process(router, transport, replicas=1):
    config = config_of(router)
    wanted_TD, wanted, wanted_dx_TD, wanted_weights = outcome(layer_of(config, LocalTransport))
    ranks = [Rank(rank, REPLICAS * replicas) for rank in range(REPLICAS * replicas)]
    layers = [layer_of(config, transport, rank) for rank in ranks]
    parts = [
        slice(replica * TOKENS, (replica + 1) * TOKENS)
        for replica in range(REPLICAS)
        for _ in range(replicas)
    ]
    for layer, part in zip(layers, parts):
        outcome(layer, part)
    for rank in ranks:
        rank.everyones = [other.said for other in ranks]
    found = [outcome(layer, part) for layer, part in zip(layers, parts)]
    for (y_TD, stats, dx_TD, _), part in zip(found, parts):
        close(y_TD, wanted_TD[part], 2e-6)
        close(dx_TD / REPLICAS, wanted_dx_TD[part], 2e-6)
        np.testing.assert_array_equal(stats["load_NE"], wanted["load_NE"])
    for name in LOSSES:
        close(np.mean([stats[name] for _, stats, _, _ in found]), wanted[name], 2e-6)
    for name, value in wanted_weights.items():
        close(np.mean([weights[name] for *_, weights in found], axis=0), value, 4e-6)
    return wanted, found


@pytest.mark.parametrize("transport", [CountsTransport, SlotsTransport])
@pytest.mark.parametrize("router", ["hash", "switch", "locmoe", "locmoe_plus", *OWN])
def test_ranks_are_one_process(router, transport, registered):
    wanted, found = assert_ranks_are_one_process(router, transport)
    own = {"OwnLosses": LOSSES, "OneOwnLoss": ("locality_loss",), "hash": LOSSES}.get(router, ())
    assert (wanted["balance_loss"] == 0) == (router in ("hash", "Unbalanced"))
    assert (wanted["locality_loss"] > 0) == (
        router in ("locmoe", "locmoe_plus", "OwnLosses", "OneOwnLoss", "Spread")
    )
    for name in (
        "balance_loss",
        "locality_loss",
    ):  # what follows from what all share is the same on all
        assert (len({float(stats[name]) for _, stats, _, _ in found}) == 1) == (
            name not in own or router == "hash"
        )


@pytest.mark.parametrize("transport", [CountsTransport, SlotsTransport])
def test_ranks_of_a_place_count_once(transport, registered):
    assert_ranks_are_one_process("locmoe", transport, replicas=2)


@pytest.mark.parametrize(
    "router, transport", [("OwnLosses", CountsTransport), ("locmoe_plus", SlotsTransport)]
)
def test_with_the_part_before_the_exchange_compiled(router, transport, registered):
    """One rank of those above."""
    layer = layer_of(config_of(router), transport, Rank(0, REPLICAS))
    part = slice(TOKENS)
    plain = outcome(layer, part)
    compiled = outcome(layer, part, jit=True)
    for mine, wanted in zip((*compiled[:1], compiled[2]), (*plain[:1], plain[2])):
        close(mine, wanted, 2e-6)
    for mine, wanted in zip((compiled[1], compiled[3]), (plain[1], plain[3])):
        assert mine.keys() == wanted.keys()
        for name in wanted:
            close(mine[name], wanted[name], 2e-6)


@pytest.mark.parametrize("sizes", ["counts", "static"])
def test_a_model_in_compiled_parts_has_the_gradients_of_one_that_is_not(sizes, registered):
    """MindSpore loses the gradient of a compiled part after another one if it returns dicts."""
    config = small_config(
        model={"num_layers": 2, "num_moe_layers": 1},
        moe={
            "router": "support.own_routers:OwnLosses",
            "z_loss": 0.1,
            **(
                {"capacity": {"local_factor": 4.0, "remote_factor": 4.0}}
                if sizes == "static"
                else {}
            ),
        },
        parallel={"expert_parallel": 2, "sizes": sizes},
        train={"batch_size": 4},
    )
    random, length = np.random.default_rng(7), config.model.seq_length
    tokens, targets = (integers(random.integers(0, 300, (4, length))) for _ in range(2))
    rest = (
        integers(np.tile(np.arange(length), (4, 1))),
        integers(np.zeros((4, length))),
        integers([0, 0, 1, 1]),
    )
    found = []
    for parts in (False, True):
        model = PanguSigma(
            config, None, Topology(1, 1, 1, EXPERTS), Exchange(SingleProcess(), [0], [0])
        )
        if parts:
            model.compile_parts()
        weights = ms.ParameterTuple(model.trainable_params())
        gradient = ms.value_and_grad(
            Objective(model, config, (DROPLESS,)), None, weights, has_aux=True
        )
        (loss, _, _), gradients = gradient(
            tokens, targets, *rest, *no_noise(4 * length, HIDDEN), tensor(1.0)
        )
        found.append([loss, *gradients])
    for mine, wanted in zip(found[1], found[0]):
        close(mine, wanted.asnumpy(), 4e-6)


@pytest.mark.parametrize(
    "name, wanted", [("OwnLosses", True), ("Unbalanced", False), ("Spread", True), ("Bare", False)]
)
def test_a_routers_losses_in_one_compiled_process(name, wanted, registered):
    """Compiled as a whole, and what a router gives is what counts."""
    layer = layer_of(config_of(name), LocalTransport)
    inputs = (
        tensor(X_TD),
        integers(TOKENS_T),
        integers(DOMAINS_T),
        no_noise(len(X_TD), HIDDEN),
        8,
        True,
    )
    plain = layer(*inputs)[1]
    compiled = Whole(layer)(*inputs[:3])
    for loss in LOSSES:
        close(compiled[loss], plain[loss].asnumpy(), 2e-6)
    plan = layer.router(*inputs[:4], True)
    for loss in LOSSES:
        if loss in plan:
            assert float(plain[loss]) == float(plan[loss])
    assert (float(plain["locality_loss"]) > 0) == wanted


class Whole(ms.nn.Cell):
    def __init__(self, layer):
        super().__init__(auto_prefix=False)
        self.layer = layer
        self.keys = no_noise(len(X_TD), HIDDEN)

    @ms.jit
    def construct(self, x_TD, tokens_T, domains_T):
        return self.layer(x_TD, tokens_T, domains_T, self.keys, 8, True)[1]
