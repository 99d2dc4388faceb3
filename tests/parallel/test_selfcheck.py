"""The start-up check on communicators that are whole, and on such as fail in the ways that were
seen.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import pytest
from mindspore import Tensor
from support.small import small_config

from pangu_locmoe.errors import CheckpointError, ConfigError, TopologyError
from pangu_locmoe.parallel import selfcheck
from pangu_locmoe.parallel.communicator import Communicator, SingleProcess
from pangu_locmoe.parallel.topology import Topology

TOPOLOGY = Topology(4, 2, 2, 4)


class Recorder(Communicator):
    """Rank 1 of 4: answers what the others would have sent, or something else where it is told
    to break.
    """

    rank = 1
    size = 4

    def __init__(self, fault: str = "", group: Sequence[int] = (0, 1, 2, 3)) -> None:
        self.fault = fault
        self.group = tuple(group)
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def broken(self, ranks: Sequence[int], fault: str) -> bool:
        if self.fault == "gone" and tuple(ranks) == self.group:
            raise RuntimeError("\nWait for rank 3 timed out\n----\nC++ Call Stack")
        return self.fault == fault and tuple(ranks) == self.group

    def all_reduce(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        self.calls.append(("sum", tuple(ranks)))
        wrong = self.broken(ranks, "sum")
        return x if wrong else x * (sum(rank + 1 for rank in ranks) / (self.rank + 1))

    def all_to_all(
        self, rows_MD: Tensor, sent: Sequence[int], received: Sequence[int], ranks: Sequence[int]
    ) -> Tensor:
        self.calls.append(("exchange", tuple(ranks)))
        assert rows_MD.shape[0] == sum(sent)
        blocks = [
            selfcheck._block(source, self.rank, count) for source, count in zip(ranks, received)
        ]
        if self.broken(ranks, "zeros"):
            blocks = [block * (source == self.rank) for source, block in zip(ranks, blocks)]
        if self.broken(ranks, "order"):
            blocks = blocks[::-1]
        if self.broken(ranks, "short"):
            blocks = blocks[:-1] if received[-1] else blocks[1:]
        return Tensor(np.concatenate(blocks))

    def all_gather(self, x: Tensor) -> Tensor:
        if self.fault == "gone":
            raise RuntimeError("Wait for rank 3 timed out")
        return Tensor(np.stack([x.asnumpy()] * self.size))

    def barrier(self) -> None:
        raise NotImplementedError


def test_every_group_is_checked_once():
    communicator = Recorder()
    selfcheck.check_groups(TOPOLOGY, communicator)
    groups = [(0, 1, 2, 3), (0, 1), (1, 3)]
    assert communicator.calls == [
        (kind, group) for group in groups for kind in ("sum", "exchange", "exchange")
    ]
    communicator = Recorder()
    selfcheck.check_groups(Topology(4, 2, 4, 4), communicator)
    assert [group for _, group in communicator.calls] == [(0, 1, 2, 3)] * 3, (
        "the world is its own expert-parallel group"
    )


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_counts_are_uneven_and_some_are_zero(size):
    matrix_RR = selfcheck.exchange_counts(size)
    away = matrix_RR[~np.eye(size, dtype=bool)]
    assert (away == 0).any() and len(set(away.tolist())) > 1
    assert (matrix_RR.sum(0) > 0).all() and (matrix_RR.sum(1) > 0).all()
    assert size > 4 or ((matrix_RR + matrix_RR.T) > 0).all(), "there and back, every way is tried"


@pytest.mark.parametrize(
    "group, name",
    [
        ((0, 1, 2, 3), "the world"),
        ((0, 1), "its expert-parallel group"),
        ((1, 3), "the group that holds the same experts"),
    ],
)
@pytest.mark.parametrize(
    "fault, message",
    [
        ("sum", r"the AllReduce in {} is wrong: the sum is 2, not .*; likely cause: another job"),
        (
            "zeros",
            r"the exchange in {} is wrong: the rows from rank \d are zero; likely cause: .*910A.*CANN",
        ),
        ("order", r"the exchange in {} is wrong: the rows from rank \d are wrong"),
        ("short", r"the exchange in {} is wrong: \d+ rows came, not \d+"),
        (
            "gone",
            r"the exchange in {} failed: Wait for rank 3 timed out; likely cause: one of these ranks",
        ),
    ],
)
def test_a_fault_names_rank_group_and_cause(fault, message, group, name):
    with pytest.raises(
        TopologyError,
        match="^rank 1: " + message.format(rf"{name} \(ranks {', '.join(map(str, group))}\)"),
    ) as error:
        selfcheck.check_groups(TOPOLOGY, Recorder(fault, group))
    assert "\n" not in str(error.value)


class Different(Recorder):
    """Ranks 2 and 3 tell another part of their digest."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.part = part

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = np.stack([x.asnumpy()] * 4)
        gathered[2:, self.part] += 1
        return Tensor(gathered)


def test_another_configuration_or_version_names_the_ranks():
    selfcheck.check_same_run(small_config(), Recorder())
    with pytest.raises(ConfigError, match=r"^ranks 2, 3 have another configuration than rank 0: "):
        selfcheck.check_same_run(small_config(), Different(slice(3, 4)))
    with pytest.raises(
        ConfigError, match=r"^ranks 2, 3 have another version of pangu_locmoe than rank 0: "
    ):
        selfcheck.check_same_run(small_config(), Different(slice(4, 5)))
    with pytest.raises(
        TopologyError,
        match=r"^rank 1: the AllGather in the world \(ranks 0, 1, 2, 3\) failed: Wait for rank 3",
    ):
        selfcheck.check_same_run(small_config(), Recorder("gone"))


def test_ranks_that_find_another_checkpoint_are_named():
    selfcheck.check_same_step(20, Recorder())
    selfcheck.check_same_step(20, SingleProcess())
    message = r"^ranks 2, 3 would continue after step 21, rank 0 after 20: the run directory must be one that all nodes share$"
    with pytest.raises(CheckpointError, match=message):
        selfcheck.check_same_step(20, Different(slice(0, 1)))


def test_what_is_compared_is_the_whole_configuration():
    told = []

    class Listening(Recorder):
        def all_gather(self, x: Tensor) -> Tensor:
            told.append(x.asnumpy().tolist())
            return super().all_gather(x)

    selfcheck.check_same_run(small_config(), Listening())
    selfcheck.check_same_run(small_config(train={"seed": 2}), Listening())
    selfcheck.check_same_run(small_config(), Listening(), version="9")
    assert told[0][:4] != told[1][:4] and told[0][4:] == told[1][4:]
    assert told[0][:4] == told[2][:4] and told[0][4:] != told[2][4:]


def test_a_world_of_one_is_not_checked():
    selfcheck.check_same_run(small_config(), SingleProcess())
    selfcheck.check_groups(Topology.emulated(1, 4), SingleProcess())
