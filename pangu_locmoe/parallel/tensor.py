"""Tensor parallelism: the ranks of a place hold slices of its matrices and compute slices of its activations.

A matrix product is cut in pairs (Megatron-LM): the first matrix by columns, the second by rows. What goes in is whole on every
rank and its gradient is the sum over the ranks (`enter`); what comes out is a partial sum, added up over the ranks
(`leave`). In between every rank works alone.

The slices of the vocabulary are in model/vocabulary.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence, Tuple

import numpy as np
from mindspore import Parameter, Tensor, nn

from pangu_locmoe.parallel.communicator import Communicator, SingleProcess


@dataclass(frozen=True)
class Cut:
    """How an array is divided: `axis` is a row of `blocks` equal blocks, and a rank has an equal slice of each.

    With more than one block, what belongs together (keys and values of a head, a token's embeddings in all domains) stays together.
    """

    axis: int
    blocks: int = 1

    def part(self, whole: np.ndarray, place: int, size: int) -> np.ndarray:
        """The slice of the rank at `place` of `size`."""
        shape = whole.shape
        apart = whole.reshape(*shape[: self.axis], self.blocks, size, -1, *shape[self.axis + 1 :])
        return apart[(slice(None),) * (self.axis + 1) + (place,)].reshape(*shape[: self.axis], -1, *shape[self.axis + 1 :])

    def whole(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The array from the slices of all ranks, in order."""
        shape = parts[0].shape
        apart = [part.reshape(*shape[: self.axis], self.blocks, 1, -1, *shape[self.axis + 1 :]) for part in parts]
        return np.concatenate(apart, axis=self.axis + 1).reshape(*shape[: self.axis], -1, *shape[self.axis + 1 :])


@dataclass(frozen=True)
class Piece:
    """What one of `count` ranks has of an array that they divide: the slice at `place`."""

    cut: Cut
    place: int
    count: int

    def of(self, whole: np.ndarray) -> np.ndarray:
        return self.cut.part(whole, self.place, self.count)


class TensorGroup:
    """The ranks of one place, as the layers see them.

    Args:
        communicator: the way to the others.
        ranks: the place's, this one among them.
    """

    def __init__(self, communicator: Communicator, ranks: Sequence[int]) -> None:
        self.size, self.place = len(ranks), list(ranks).index(communicator.rank)
        self.enter: nn.Cell = _AsItIs()
        self.leave: nn.Cell = _AsItIs()
        if self.size > 1:
            self.sum = communicator.summing(ranks)
            self.enter, self.leave = _Enter(self.sum), _Leave(self.sum)

    @classmethod
    def alone(cls) -> TensorGroup:
        """A rank that has its matrices to itself."""
        return cls(SingleProcess(), [0])

    def parameter(self, whole: np.ndarray, name: str, cut: Cut) -> Parameter:
        """This rank's slice of an array, fp32. It remembers its cut, for checkpoints and for the reduction of gradients."""
        if self.size == 1:
            return Parameter(Tensor(whole), name=name)
        parameter = Parameter(Tensor(cut.part(whole, self.place, self.size)), name=name)
        parameter.cut = cut
        return parameter


def cut_of(parameter: Parameter) -> Cut | None:
    """How a parameter is divided over its tensor-parallel group; None: it is whole on every rank."""
    return getattr(parameter, "cut", None)


def piece_of(parameter: Parameter) -> Piece | None:
    """Which piece of a parameter's moments this is; None: they are not divided over the ranks that hold the same parameter."""
    return getattr(parameter, "piece", None)


class _AsItIs(nn.Cell):
    def construct(self, x: Tensor) -> Tensor:
        return x


class _Enter(nn.Cell):
    """The identity; the gradient is summed over the group."""

    def __init__(self, total: Any) -> None:
        super().__init__()
        self.sum = total

    def construct(self, x: Tensor) -> Tensor:
        return x

    def bprop(self, x: Tensor, out: Tensor, grad: Tensor) -> Tuple[Tensor]:
        return (self.sum(grad),)


class _Leave(nn.Cell):
    """The sum over the group; the gradient is the same on all its ranks already."""

    def __init__(self, total: Any) -> None:
        super().__init__()
        self.sum = total

    def construct(self, x: Tensor) -> Tensor:
        return self.sum(x)

    def bprop(self, x: Tensor, out: Tensor, grad: Tensor) -> Tuple[Tensor]:
        return (grad,)
