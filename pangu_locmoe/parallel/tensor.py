"""Tensor parallelism: the ranks of a replica hold slices of its matrices and compute slices of its
activations.

A matrix product is cut in pairs (Megatron-LM): the first matrix by columns, the second by rows.
What goes in is whole on every rank and its gradient is the sum over the ranks (`enter`); what comes
out is a partial sum, added up over the ranks (`leave`). In between every rank works alone.

With sequence parallelism (Korthikanti et al. 2022) a rank keeps only its part of the rows outside
of these pairs: in the residual stream, the norms and dropout. Rows then enter by a gather, whose
gradient is a reduce-scatter, and leave by a reduce-scatter, whose gradient is a
gather: as many bytes as the sums they replace. Rows are tokens, in equal contiguous parts, because
everything outside is per token.

The slices of the vocabulary are in model/vocabulary.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Sequence, Tuple

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from pangu_locmoe.parallel.communicator import Communicator, SingleProcess


@dataclass(frozen=True)
class Cut:
    """How an array is divided: `axis` is a row of `blocks` equal blocks, and a rank has an equal
    slice of each.

    With more than one block, what belongs together (keys and values of a head, a token's embeddings
    in all domains) stays together.
    """

    axis: int
    blocks: int = 1

    def part(self, whole: np.ndarray, position: int, size: int) -> np.ndarray:
        """The slice of the rank at `position` of `size`."""
        shape = whole.shape
        apart = whole.reshape(*shape[: self.axis], self.blocks, size, -1, *shape[self.axis + 1 :])
        return apart[(slice(None),) * (self.axis + 1) + (position,)].reshape(
            *shape[: self.axis], -1, *shape[self.axis + 1 :]
        )

    def whole(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The array from the slices of all ranks, in order."""
        shape = parts[0].shape
        apart = [
            part.reshape(*shape[: self.axis], self.blocks, 1, -1, *shape[self.axis + 1 :])
            for part in parts
        ]
        return np.concatenate(apart, axis=self.axis + 1).reshape(
            *shape[: self.axis], -1, *shape[self.axis + 1 :]
        )


@dataclass(frozen=True)
class Piece:
    """What one of `count` ranks has of an array that they divide: the slice at `position`."""

    cut: Cut
    position: int
    count: int

    def of(self, whole: np.ndarray) -> np.ndarray:
        return self.cut.part(whole, self.position, self.count)


class TensorGroup:
    """The ranks of one replica, as the layers see them.

    Args:
        communicator: the way to the others.
        ranks: the replica's, this one among them.
        sequence_parallel: whether each keeps only its part of the rows outside of the matrices.

    Attributes:
        enter, leave: into and out of a pair of matrices, for what is whole on all ranks outside.
        enter_rows, leave_rows: the same for the residual stream's rows.
        whole_rows, own_rows: to all rows, for what every rank computes alike and without sums over
            the group (routing), and back.
        own_rows_of: this rank's rows of what has no gradient.
    """

    def __init__(
        self, communicator: Communicator, ranks: Sequence[int], sequence_parallel: bool = False
    ) -> None:
        self.size = len(ranks)
        self.position = list(ranks).index(communicator.rank)
        self.divides_rows = sequence_parallel
        self.own_rows_of: nn.Cell = (
            _OwnRows(self.position, self.size) if sequence_parallel else _AsItIs()
        )
        self._gather = partial(communicator.gathering, ranks)
        self._scatter = partial(communicator.scattering, ranks)
        if self.size > 1:
            self.sum = communicator.summing(ranks)

    # A cell of its own for every use: the gradient of a compiled part that uses one of these
    # twice is wrong in MindSpore 2.10.

    @property
    def enter(self) -> nn.Cell:
        return _Way(_AsItIs(), self.sum) if self.size > 1 else _AsItIs()

    @property
    def leave(self) -> nn.Cell:
        return _Way(self.sum, _AsItIs()) if self.size > 1 else _AsItIs()

    @property
    def enter_rows(self) -> nn.Cell:
        return _Way(self._gather(), self._scatter()) if self.divides_rows else self.enter

    @property
    def leave_rows(self) -> nn.Cell:
        return _Way(self._scatter(), self._gather()) if self.divides_rows else self.leave

    @property
    def whole_rows(self) -> nn.Cell:
        return (
            _Way(self._gather(), _OwnRows(self.position, self.size))
            if self.divides_rows
            else _AsItIs()
        )

    @property
    def own_rows(self) -> nn.Cell:
        return (
            _Way(_OwnRows(self.position, self.size), self._gather())
            if self.divides_rows
            else _AsItIs()
        )

    @classmethod
    def alone(cls) -> TensorGroup:
        """A rank that has its matrices to itself."""
        return cls(SingleProcess(), [0])

    def parameter(self, whole: np.ndarray, name: str, cut: Cut) -> Parameter:
        """This rank's slice of an array, fp32.

        It remembers its cut, for checkpoints and for the reduction of gradients.
        """
        if self.size == 1:
            return Parameter(Tensor(whole), name=name)
        parameter = Parameter(Tensor(cut.part(whole, self.position, self.size)), name=name)
        parameter.cut = cut
        return parameter

    def for_own_rows(self, cell: nn.Cell) -> nn.Cell:
        """A cell that is applied to the rank's rows only: its parameters' gradients are partial
        sums where rows are divided.
        """
        for parameter in cell.trainable_params() if self.divides_rows else ():
            parameter.has_partial_gradient = True
        return cell


def has_partial_gradient(parameter: Parameter) -> bool:
    """Whether the ranks of a replica each have a part of the gradient of a parameter that is whole
    on all of them.
    """
    return getattr(parameter, "has_partial_gradient", False)


def cut_of(parameter: Parameter) -> Cut | None:
    """How a parameter is divided over its tensor-parallel group; None: it is whole on every
    rank.
    """
    return getattr(parameter, "cut", None)


def piece_of(parameter: Parameter) -> Piece | None:
    """Which piece of a parameter's moments this is; None: they are not divided over the ranks
    that hold the same parameter.
    """
    return getattr(parameter, "piece", None)


class _AsItIs(nn.Cell):
    def construct(self, x: Tensor) -> Tensor:
        return x


class _Way(nn.Cell):
    """One operator forward and another backward."""

    def __init__(self, there: Any, back: Any) -> None:
        super().__init__()
        self.there = there
        self.back = back

    def construct(self, x: Tensor) -> Tensor:
        return self.there(x)

    def bprop(self, x: Tensor, out: Tensor, grad: Tensor) -> Tuple[Tensor]:
        return (self.back(grad),)


class _OwnRows(nn.Cell):
    """This rank's rows."""

    def __init__(self, position: int, count: int) -> None:
        super().__init__()
        self.position = position
        self.split = ops.Split(0, count)

    def construct(self, rows_MX: Tensor) -> Tensor:
        return self.split(rows_MX)[self.position]
