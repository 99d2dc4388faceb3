"""The stepper around the compiled step: what it hands to the graph and makes of its results; the
graph is a stand-in.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.small import small_config

from pangu_locmoe.data.loader import Batch
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.hccl import HcclOperators
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.step import KEPT_STEPS, GraphStepper
from pangu_locmoe.train.step.cells import WholeStep


class OnPaper(HcclOperators):
    """Everyone has what this rank has."""

    def all_gather(self, x: Tensor) -> Tensor:
        return Tensor(np.stack([x.asnumpy()] * self.size))


def make(communicator, **train):
    config = small_config(
        moe={"capacity": {"local_factor": 2.0, "remote_factor": 2.0}},
        parallel={"expert_parallel": 2, "nodes": 2, "sizes": "static"},
        train={"batch_size": 4, **train},
    )
    topology = Topology.from_config(config, 2)
    exchange = Exchange(communicator, [0, 1], [0, 1], False)
    world = World(communicator, topology, exchange)
    return GraphStepper(PanguSigma(config, None, topology, exchange), config, world, (8,))


def test_a_step_takes_this_ranks_sequences(monkeypatch):
    given = []

    def step(*inputs):
        given.extend(inputs)
        stats = {
            "layer_sums": (3,),
            "load_LNE": (1, 2, 4),
            "dropped_LE": (1, 4),
            "cosine_LT": (1, 16),
        }
        return (
            Tensor(np.full(5, 2.0, np.float32)),
            tuple(
                Tensor(np.ones(stats.get(name, ()), np.float32))
                for name in stepper.model.stats_names
            ),
            Tensor(0.5, ms.float32),
        )

    monkeypatch.setattr(
        "pangu_locmoe.train.step.graph.ms.jit",
        lambda cell: step if isinstance(cell, WholeStep) else cell,
    )
    stepper = make(OnPaper(1, 2, lambda name, ranks: None))
    rows = np.arange(4 * 8, dtype=np.int32).reshape(4, 8)
    stepper.updates = 2
    result = stepper(
        Batch(rows, rows + 1, rows + 2, rows + 3, np.arange(4, dtype=np.int32), np.ones(4, bool)),
        step=9,
        learning_rate=0.25,
    )
    assert stepper.updates == 3
    assert [float(tensor.asnumpy()) for tensor in (*given[:2], given[-1])] == [0.25, 3.0, 1.0]
    for offset, tensor in enumerate(given[2:6]):
        np.testing.assert_array_equal(tensor.asnumpy(), rows[2:] + offset)
    assert given[6].asnumpy().tolist() == [2, 3]
    assert (result.grad_norm, result.losses["loss"], result.skipped) == (0.5, 2.0, False)
    # 16 tokens on each rank, 4 experts: 8 slots for each; 2 experts are the other rank's; 4
    # exchanges of fp32 rows of 16.
    assert (result.traffic.inter_node_bytes, result.traffic.intra_node_bytes) == (
        2 * 4 * 16 * 64,
        0,
    )
    assert result.dropped_LE.tolist() == [[2, 2, 2, 2]] and result.cosine_LT.shape == (1, 32)


def test_the_graphs_of_factors_are_used_again_and_only_the_latest_kept():
    stepper = make(OnPaper(1, 2, lambda name, ranks: None))
    start = stepper.factors
    used = []

    def use(local):
        stepper.set_factors(start.model_copy(update={"local_factor": local}))
        assert stepper.factors.local_factor == local
        used.append(stepper._step)

    for local in (2.0, 1.0, 2.0):
        use(local)
    assert used[0] is used[2] is not used[1]
    for local in (4.0, 3.0, 2.5, 1.5, 1.25)[: KEPT_STEPS - 1]:
        use(local)
    use(2.0)
    assert used[-1] is used[0]  # the latest but KEPT_STEPS - 1
    use(1.0)
    assert used[-1] is not used[1]
    assert len(stepper._steps) == KEPT_STEPS


def test_other_devices_are_refused():
    elsewhere = SingleProcess()
    elsewhere.size = 2
    with pytest.raises(ConfigError, match="on Ascend only"):
        make(elsewhere)
