"""The five operations that training needs from other processes, and the single process, where they
are trivial.

Letters: R ranks, M rows sent, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Callable, Sequence

from mindspore import Tensor, nn, ops


class Communicator(ABC):
    """What a rank can ask of the others.

    Every rank of a group must make the same calls in the same order.
    """

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        """The sum of `x` over `ranks`, which must contain this one. No gradient."""

    def summing(self, ranks: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """`all_reduce` over a group as a function of the tensor alone; where graphs are
        compiled, an operator.
        """
        return partial(self.all_reduce, ranks=ranks)

    def gathering(self, ranks: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """The rows of all ranks of a group from each one's, as `summing`: an operator where graphs
        are compiled. No gradient.

        Unless there is an operator for it: the sum of arrays that are zero but for one rank's rows.
        """
        return _GatherBySum(self.summing(ranks), list(ranks).index(self.rank), len(ranks))

    def scattering(self, ranks: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """This rank's equal part of the rows of the sum over a group, as `summing`. No gradient.

        Unless there is an operator for it: the whole sum, of which a part is taken.
        """
        return _ScatterBySum(self.summing(ranks), list(ranks).index(self.rank), len(ranks))

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """`x` of every rank of the world, [R, ...]. No gradient."""

    @abstractmethod
    def all_to_all(
        self, rows_MD: Tensor, sent: Sequence[int], received: Sequence[int], ranks: Sequence[int]
    ) -> Tensor:
        """Exchange rows inside a group. No gradient: parallel/exchange.py has it.

        Args:
            rows_MD: rows for ranks[0], then for ranks[1], ...
            sent: how many rows go to each of `ranks`.
            received: how many come from each; the caller knows.
            ranks: the group, the same on all its members, with this rank among them.

        Returns:
            rows from ranks[0], then from ranks[1], ..., [sum(received), D].
        """

    def reduce_scatter(self, rows_MX: Tensor, ranks: Sequence[int]) -> Tensor:
        """This rank's equal part of the rows of the sum over `ranks`; M must be divisible by their
        number. No gradient.

        Unless there is an operator for it: every rank sends each its part, which that one adds up.
        """
        part = rows_MX.shape[0] // len(ranks)
        counts = [part] * len(ranks)
        arrived = self.all_to_all(rows_MX, counts, counts, ranks)
        return ops.reduce_sum(ops.reshape(arrived, (len(ranks), part, *rows_MX.shape[1:])), 0)

    def gather_rows(self, rows_MX: Tensor, ranks: Sequence[int]) -> Tensor:
        """The rows of ranks[0], then of ranks[1], ...; all have as many. No gradient.

        Unless there is an operator for it: every rank sends its rows to every other.
        """
        counts = [rows_MX.shape[0]] * len(ranks)
        return self.all_to_all(ops.concat([rows_MX] * len(ranks), 0), counts, counts, ranks)

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank is here."""


class _GatherBySum(nn.Cell):
    def __init__(self, total: Callable[[Tensor], Tensor], position: int, count: int) -> None:
        super().__init__()
        self.sum = total
        self.position = position
        self.count = count
        self.zeros = ops.ZerosLike()
        self.concat = ops.Concat(0)

    def construct(self, rows_MX: Tensor) -> Tensor:
        zeros_MX = self.zeros(rows_MX)
        rows = []
        for position in range(self.count):
            rows.append(rows_MX if position == self.position else zeros_MX)
        return self.sum(self.concat(rows))


class _ScatterBySum(nn.Cell):
    def __init__(self, total: Callable[[Tensor], Tensor], position: int, count: int) -> None:
        super().__init__()
        self.sum = total
        self.position = position
        self.count = count
        self.split = ops.Split(0, count)

    def construct(self, rows_MX: Tensor) -> Tensor:
        return self.split(self.sum(rows_MX))[self.position]


class SingleProcess(Communicator):
    """A world of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return ops.expand_dims(x, 0)

    def all_to_all(
        self, rows_MD: Tensor, sent: Sequence[int], received: Sequence[int], ranks: Sequence[int]
    ) -> Tensor:
        return rows_MD

    def barrier(self) -> None:
        return None
