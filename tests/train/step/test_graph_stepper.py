"""The stepper around the compiled step: what it hands to the graph and makes of its results; the graph is a stand-in."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from small import small_config

from pangu_locmoe.cluster.step import GraphStep, GraphStepper
from pangu_locmoe.data.loader import Batch
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.hccl import HcclOperators
from pangu_locmoe.parallel.topology import Topology


class OnPaper(HcclOperators):
    """Everyone has what this rank has."""

    def all_gather(self, x: Tensor) -> Tensor:
        return Tensor(np.stack([x.asnumpy()] * self.size))


def make(communicator, **train):
    config = small_config(
        moe={"capacity": {"local_factor": 2.0, "remote_factor": 2.0}},
        parallel={"expert_parallel": 2, "ranks_per_node": 1, "sizes": "static"},
        train={"batch_size": 4, **train},
    )
    topology = Topology.from_config(config, 2)
    exchange = Exchange(communicator, [0, 1], [0, 1], False)
    return GraphStepper(PanguSigma(config, None, topology, exchange), config, (8,), topology, exchange)


def test_a_step_takes_this_ranks_sequences(monkeypatch):
    given = []

    def step(*inputs):
        given.extend(inputs)
        stats = {"layer_sums": (3,), "load_LNE": (1, 2, 4), "dropped_LE": (1, 4), "cosine_LT": (1, 16)}
        return Tensor(np.full(5, 2.0, np.float32)), {name: Tensor(np.ones(shape, np.float32)) for name, shape in stats.items()}, Tensor(0.5, ms.float32)

    monkeypatch.setattr("pangu_locmoe.cluster.step.ms.jit", lambda cell: step if isinstance(cell, GraphStep) else cell)
    stepper = make(OnPaper(1, 2, lambda name, ranks: None))
    rows = np.arange(4 * 8, dtype=np.int32).reshape(4, 8)
    result = stepper(Batch(rows, rows + 1, rows + 2, rows + 3, np.arange(4, dtype=np.int32), np.ones(4, bool)), step=3, learning_rate=0.25)
    assert [float(tensor.asnumpy()) for tensor in (*given[:2], given[-1])] == [0.25, 3.0, 1.0]
    for offset, tensor in enumerate(given[2:6]):
        np.testing.assert_array_equal(tensor.asnumpy(), rows[2:] + offset)
    assert given[6].asnumpy().tolist() == [2, 3]
    assert (result.grad_norm, result.losses["loss"], result.skipped) == (0.5, 2.0, False)
    # 16 tokens on each rank, 4 experts: 8 slots for each; 2 experts are the other rank's; 4 exchanges of fp32 rows of 16.
    assert (result.traffic.inter_node_bytes, result.traffic.intra_node_bytes) == (2 * 4 * 16 * 64, 0)
    assert result.dropped_LE.tolist() == [[2, 2, 2, 2]] and result.cosine_LT.shape == (1, 32)


def test_other_devices_are_refused():
    elsewhere = SingleProcess()
    elsewhere.size = 2
    with pytest.raises(ConfigError, match="on Ascend only"):
        make(elsewhere)
