"""All ranks of a group in one process, without threads: exchanges are stepped one hop at a time.

A rank's moves depend on the counts, never on what arrives. So every rank runs until it asks for an
exchange whose result is not known yet; when all have asked, the exchange is made, and all run again
from the start with one more result known.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

import numpy as np
from mindspore import Tensor

from pangu_locmoe.parallel.communicator import Communicator


class _Waiting(Exception):
    """A rank cannot go on before the others have come this far."""


class LockstepRank(Communicator):
    """One rank; `results` are the exchanges that all have made, `request` what it asks for next."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.results: list[np.ndarray] = []
        self.request: tuple[np.ndarray, list[int], list[int], list[int]] | None = None
        self.count = 0

    def all_to_all(
        self, rows_MD: Tensor, sent: Sequence[int], received: Sequence[int], ranks: Sequence[int]
    ) -> Tensor:
        self.count += 1
        if self.count <= len(self.results):
            return Tensor(self.results[self.count - 1])
        self.request = (rows_MD.asnumpy(), list(sent), list(received), list(ranks))
        raise _Waiting

    def all_reduce(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def all_gather(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def barrier(self) -> None:
        raise NotImplementedError


def run(size: int, function: Callable[[LockstepRank], Any]) -> list[Any]:
    """function(rank) on every rank; what each returned."""
    ranks = [LockstepRank(rank, size) for rank in range(size)]
    while True:
        returned = []
        for rank in ranks:
            rank.count = 0
            rank.request = None
            try:
                returned.append(function(rank))
            except _Waiting:
                continue
        if len(returned) == size:
            return returned
        assert not returned, "some ranks ended while others wait for an exchange"
        _exchange(ranks)


def _exchange(ranks: list[LockstepRank]) -> None:
    requests = [rank.request for rank in ranks]
    blocks = {}
    for source, (rows, sent, _, group) in enumerate(requests):  # type: ignore[misc]
        assert all(requests[other][3] == group for other in group), (
            "the members of a group ask for other groups"
        )  # type: ignore[index]
        assert len(rows) == sum(sent)
        blocks.update(
            {
                (source, target): part
                for target, part in zip(group, np.split(rows, np.cumsum(sent)[:-1]))
            }
        )
    for target, (rank, (_, _, received, group)) in enumerate(zip(ranks, requests)):  # type: ignore[misc]
        arrived = [blocks[source, target] for source in group]
        assert [len(block) for block in arrived] == received, (
            "a rank expects other counts than the others send"
        )
        rank.results.append(np.concatenate(arrived))
