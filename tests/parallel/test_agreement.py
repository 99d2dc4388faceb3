"""What fails on one rank fails on all, with the same line.

Ranks are threads, their gathers a barrier.
"""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from mindspore import Tensor
from support import tiny

from pangu_locmoe.checkpoint import format as checkpoints
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.errors import CheckpointError, ConfigError, DataError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.agreement import together
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.world import World

TIMEOUT = 60


class Threads(SingleProcess):
    """A rank that is a thread."""

    def __init__(
        self, rank: int, size: int, meeting: threading.Barrier, seen: dict[int, np.ndarray]
    ) -> None:
        self.rank = rank
        self.size = size
        self.meeting = meeting
        self.seen = seen

    def all_gather(self, x: Tensor) -> Tensor:
        self.seen[self.rank] = x.asnumpy()
        self.meeting.wait(TIMEOUT)
        found = Tensor(np.stack([self.seen[rank] for rank in range(self.size)]))
        self.meeting.wait(TIMEOUT)
        return found


def on_ranks(size, function):
    """What function(communicator) raised on every rank, None where nothing."""
    meeting = threading.Barrier(size)
    seen = {}

    def run(rank):
        try:
            function(Threads(rank, size, meeting, seen))
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def failing(error, on):
    def function(communicator):
        with together(communicator, ConfigError):
            if communicator.rank in on:
                raise error(f"rank {communicator.rank} says no" + "\u65e0" * 700)

    return function


@pytest.mark.parametrize("on", [(0,), (2,), (1, 2)])
def test_all_ranks_raise_what_the_first_says(on):
    raised = on_ranks(3, failing(DataError, on))
    assert len({str(error) for error in raised}) == 1
    assert str(raised[0]).startswith(f"rank {on[0]} says no\u65e0\u65e0")
    assert [type(error) for error in raised] == [
        DataError if rank in on else ConfigError for rank in range(3)
    ]


def test_nothing_is_raised_where_nothing_failed():
    assert on_ranks(3, failing(DataError, ())) == [None] * 3


def test_one_process_raises_its_own_error():
    with pytest.raises(DataError, match="rank 0 says no"):
        failing(DataError, (0,))(SingleProcess())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_cannot_write_its_part_ends_the_checkpoint_on_all(
    tmp_path, monkeypatch, victim
):
    """Nobody waits, one rank removes, and the checkpoint before is whole."""
    config = tiny.tiny_config(moe={"router": "hash"})
    model = PanguSigma(config)
    tokenizer_file = prepare(config, False).path / "tokenizer.json"
    before = tmp_path / "step-00000001"
    checkpoints.save_checkpoint(before, config, tokenizer_file, model, None, {"step": 1})
    real = checkpoints._sync

    def full(path):
        if path.name == checkpoints.shard_name("model", victim):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    monkeypatch.setattr(checkpoints, "_sync", full)
    topology = World.of(config).topology
    two = type(topology).from_config(
        config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update={"expert_parallel": 2, "nodes": 1})
            }
        ),
        2,
    )

    def save(communicator):
        checkpoints.save_checkpoint(
            tmp_path / "step-00000002",
            config,
            tokenizer_file,
            model,
            None,
            {"step": 2},
            World(communicator, two, object()),
        )

    raised = on_ranks(2, save)
    assert len({str(error) for error in raised}) == 1
    assert all(
        isinstance(error, CheckpointError)
        and "step-00000002 cannot be written: [Errno 28] No space left" in str(error)
        for error in raised
    )
    assert [path.name for path in tmp_path.iterdir()] == [before.name]
    monkeypatch.undo()
    checkpoints.load_weights(before, model)
