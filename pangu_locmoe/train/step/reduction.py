"""What comes after the backward pass in the compiled step of a job: gradients reduced over ranks, their norm, pieces gathered.

As parallel/gradients.py, with operators that a graph can hold. All groups are made here, in the same order on all ranks.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

from mindspore import ParameterTuple, Tensor, nn, ops

from pangu_locmoe.parallel.gradients import holders, kinds, share, with_axis_first
from pangu_locmoe.parallel.hccl import HcclOperators
from pangu_locmoe.parallel.tensor import Piece
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.optimizer import AdamW, zeros


class Reduce(nn.Cell):
    """Gradients of this rank's loss -> those of the job's, for this rank's parameters or its pieces of them.

    Args:
        optimizer: of this rank's parameters.
        topology: who holds what.
        communicator: names the groups.
    """

    def __init__(self, optimizer: AdamW, topology: Topology, communicator: HcclOperators) -> None:
        super().__init__(auto_prefix=False)
        rank, parameters = communicator.rank, list(optimizer.parameters)
        self.optimizer, self.count = optimizer, len(parameters)
        self.kinds = kinds(parameters, optimizer.pieces)
        self.shares = [share(parameter, topology) for parameter in parameters]
        holding = [holders(parameter, topology, rank) for parameter in parameters]
        self.sums = [_Sum(communicator, ranks, piece) for ranks, piece in zip(holding, optimizer.pieces)]
        self.over_experts = _Sum(communicator, topology.expert_group(rank))
        self.over_tensor = _Sum(communicator, topology.tensor_group(rank))
        self.any_pieces = any(optimizer.divided)
        self.over_world = _Sum(communicator, tuple(range(topology.num_ranks)) if self.any_pieces else (rank,))

    def construct(self, gradients: Tuple[Tensor, ...], factor: Tensor) -> Tuple[Tuple[Tensor, ...], Tensor]:
        """Returns the reduced gradients times `factor`, and the norm of the whole gradient."""
        reduced = []
        whole = []
        slices = []
        experts = []
        pieces = []
        for index in range(self.count):
            gradient = self.sums[index](gradients[index]) * (self.shares[index] * factor)
            if self.kinds[index] == "expert":
                experts.append(gradient)
            elif self.kinds[index] == "slice":
                slices.append(gradient)
            elif self.kinds[index] == "piece":
                pieces.append(gradient)
            else:
                whole.append(gradient)
            reduced.append(gradient)
        # As `gradients.squared_norm`: a rank has its own experts, slices and pieces only.
        of_experts = self.over_experts(ops.reshape(self.optimizer.squared_norm(tuple(experts)), (1,)))
        total = self.optimizer.squared_norm(tuple(whole)) + self.over_tensor(ops.reshape(self.optimizer.squared_norm(tuple(slices)), (1,)) + of_experts)[0]
        if self.any_pieces:
            total = total + self.over_world(ops.reshape(self.optimizer.squared_norm(tuple(pieces)), (1,)))[0]
        return tuple(reduced), ops.sqrt(total)


class Update(nn.Cell):
    """AdamW from reduced gradients; then each parameter is put together from the pieces that the ranks have updated."""

    def __init__(self, optimizer: AdamW, topology: Topology, communicator: HcclOperators) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer, self.divided, self.count = optimizer, optimizer.divided, len(optimizer.parameters)
        self.parameters, self.updated = optimizer.parameters, optimizer.updated
        gathers: List[nn.Cell] = []
        for parameter, piece in zip(optimizer.parameters, optimizer.pieces):
            ranks = holders(parameter, topology, communicator.rank)
            gathers.append(nn.Identity() if piece is None else _GatherPieces(communicator, ranks, piece.cut.axis))
        self.gathers = gathers

    def construct(self, gradients: Tuple[Tensor, ...], learning_rate: Tensor, step: Tensor, norm: Tensor) -> Tensor:
        self.optimizer.update(gradients, learning_rate, step, norm)
        for index in range(self.count):
            if self.divided[index]:
                ops.assign(self.parameters[index], self.gathers[index](self.updated[index]))
        return norm


class ReduceBuffers(nn.Cell):
    """`Reduce` of gradients that were added up in buffers; the result stays in `reduced`."""

    def __init__(self, reduce: Reduce, buffers: ParameterTuple, reduced: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.reduce, self.buffers, self.reduced, self.count = reduce, buffers, reduced, len(buffers)

    def construct(self, factor: Tensor) -> Tensor:
        """Returns the norm of the whole gradient."""
        gradients, norm = self.reduce(tuple(self.buffers), factor)
        for index in range(self.count):
            ops.assign(self.reduced[index], gradients[index])
        return norm


class UpdateFromBuffers(nn.Cell):
    """Update from reduced gradients and clear the buffers, or only clear them."""

    def __init__(self, update: Update, buffers: ParameterTuple, reduced: ParameterTuple, apply: bool) -> None:
        super().__init__(auto_prefix=False)
        self.update, self.buffers, self.reduced, self.apply_update = update, buffers, reduced, apply

    def construct(self, learning_rate: Tensor, step: Tensor, norm: Tensor) -> Tensor:
        if self.apply_update:
            self.update(tuple(self.reduced), learning_rate, step, norm)
        for buffer in self.buffers:
            ops.assign(buffer, ops.zeros_like(buffer))
        return norm


def reduced_buffers(optimizer: AdamW, buffers: ParameterTuple) -> ParameterTuple:
    """Where reduced gradients stay: in the buffers they come from, or of a piece's size in buffers of their own."""
    results = zip(buffers, optimizer.updated, optimizer.divided)
    return ParameterTuple([zeros(updated.shape, f"reduced.{updated.name}") if divided else buffer for buffer, updated, divided in results])


class _Sum(nn.Cell):
    """The sum over some ranks; with a piece, each gets its block of an axis."""

    def __init__(self, communicator: HcclOperators, ranks: Tuple[int, ...], piece: Optional[Piece] = None) -> None:
        super().__init__()
        self.axis, self.sum = 0, nn.Identity()
        if piece is not None:
            self.axis, self.sum = piece.cut.axis, communicator.scattering(ranks)
        elif len(ranks) > 1:
            self.sum = communicator.summing(ranks)

    def construct(self, x: Tensor) -> Tensor:
        return with_axis_first(self.sum(with_axis_first(x, self.axis)), self.axis)


class _GatherPieces(nn.Cell):
    """The blocks of all ranks, along an axis."""

    def __init__(self, communicator: HcclOperators, ranks: Tuple[int, ...], axis: int) -> None:
        super().__init__()
        self.axis, self.gather = axis, communicator.gathering(ranks)

    def construct(self, piece: Tensor) -> Tensor:
        return with_axis_first(self.gather(with_axis_first(piece, self.axis)), self.axis)
