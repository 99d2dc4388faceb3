"""One result from the micro-batches of all ranks, in numbers."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.exchange import Ledger
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.step.result import step_result


class Ranks(SingleProcess):
    """This rank's figures times 1, 2, 3, ..."""

    def __init__(self, size: int) -> None:
        self.size = size

    def all_gather(self, x: Tensor) -> Tensor:
        return Tensor(np.stack([x.asnumpy() * (rank + 1) for rank in range(self.size)]))


def report(factor: float, **more: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
    """A layer of two experts, one node, three tokens."""
    stats = {
        "layer_sums": np.full(2, factor),
        "load_LNE": np.array([[[2, 1]]]),
        "dropped_LE": np.array([[1, 0]]),
        "cosine_LT": np.full((1, 3), factor),
        **more,
    }
    tensors = {name: Tensor(np.asarray(value, np.float32)) for name, value in stats.items()}
    return Tensor(np.full(5, factor, np.float32)), tensors


def test_losses_are_means_and_counts_are_sums_over_micro_batches():
    result = step_result(
        [report(1.0), report(3.0)],
        0.5,
        True,
        None,
        World(SingleProcess(), Topology.emulated(1, 2)),
        False,
    )
    assert list(result.losses.values()) == [2.0] * 5 and next(iter(result.losses)) == "loss"
    assert (result.grad_norm, result.skipped, result.traffic, result.unrouted) == (
        0.5,
        True,
        None,
        None,
    )
    assert result.load_LNE.tolist() == [[[4, 2]]] and result.dropped_LE.tolist() == [[2, 0]]
    assert result.load_LNE.dtype == result.dropped_LE.dtype == np.int64
    assert result.cosine_LT.tolist() == [[1, 1, 1, 3, 3, 3]] and result.layer_sums.tolist() == [
        4,
        4,
    ]


@pytest.mark.parametrize("rows_divided, sums", [(False, 1 + 3), (True, 1 + 2 + 3 + 4)])
def test_the_first_rank_of_a_place_speaks_for_it(rows_divided, sums):
    """Four ranks in two replicas: only sums over rows can differ inside of one."""
    world = World(Ranks(4), Topology(4, 4, 2, 2, tensor_parallel=2))
    ledger = Ledger(7)
    result = step_result([report(1.0, unrouted_L=[0.25])], 1.0, False, ledger, world, rows_divided)
    assert list(result.losses.values()) == [2.0] * 5 and result.unrouted == 0.5
    assert result.load_LNE.tolist() == [[[2, 1]]]  # the world's already
    assert result.dropped_LE.tolist() == [[1 + 3, 0]] and result.cosine_LT.tolist() == [
        [1, 1, 1, 3, 3, 3]
    ]
    assert result.layer_sums.tolist() == [sums, sums] and result.traffic is ledger


def test_a_dense_model_has_no_counts():
    losses, stats = report(1.0)
    result = step_result(
        [(losses, {"layer_sums": stats["layer_sums"]})],
        1.0,
        False,
        None,
        World(SingleProcess(), Topology.emulated(1, 2)),
        False,
    )
    assert (result.load_LNE.shape, result.dropped_LE.shape, result.cosine_LT.shape) == (
        (0, 1, 0),
        (0, 0),
        (0, 0),
    )
