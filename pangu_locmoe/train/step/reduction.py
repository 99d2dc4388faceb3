"""What comes after the backward pass in the compiled step of a job: gradients reduced over ranks,
their norm, pieces gathered.

As parallel/gradients.py, with operators that a graph can hold. All groups are made here, in the
same order on all ranks.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

from mindspore import Tensor, nn, ops

from pangu_locmoe.parallel.gradients import gradient_factor, holders, kinds, with_axis_first
from pangu_locmoe.parallel.hccl import HcclOperators
from pangu_locmoe.parallel.tensor import Piece
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.optimizer import AdamW


class Reduce(nn.Cell):
    """Gradients of this rank's loss -> those of the job's, for this rank's parameters or its pieces
    of them.

    Args:
        optimizer: of this rank's parameters.
        topology: who holds what.
        communicator: names the groups.
    """

    def __init__(self, optimizer: AdamW, topology: Topology, communicator: HcclOperators) -> None:
        super().__init__(auto_prefix=False)
        rank = communicator.rank
        parameters = list(optimizer.parameters)
        self.optimizer = optimizer
        self.count = len(parameters)
        self.kinds = kinds(parameters, optimizer.pieces)
        self.factors = [gradient_factor(parameter, topology) for parameter in parameters]
        holding = [holders(parameter, topology, rank) for parameter in parameters]
        self.sums = [
            _Sum(communicator, ranks, piece) for ranks, piece in zip(holding, optimizer.pieces)
        ]
        self.over_experts = _Sum(communicator, topology.expert_group(rank))
        self.over_tensor = _Sum(communicator, topology.tensor_group(rank))
        self.any_pieces = any(optimizer.divided)
        self.over_world = _Sum(
            communicator, tuple(range(topology.num_ranks)) if self.any_pieces else (rank,)
        )

    def construct(
        self, gradients: Tuple[Tensor, ...], factor: Optional[Tensor]
    ) -> Tuple[Tuple[Tensor, ...], Tensor]:
        """Returns the reduced gradients times `factor` (None, a constant of the graph: as they
        are), and the norm of the whole gradient.
        """
        reduced = []
        whole = []
        slices = []
        experts = []
        pieces = []
        for index in range(self.count):
            scale = self.factors[index] if factor is None else self.factors[index] * factor
            gradient = self.sums[index](gradients[index]) * scale
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
        of_experts = self.over_experts(
            ops.reshape(self.optimizer.squared_norm(tuple(experts)), (1,))
        )
        total = (
            self.optimizer.squared_norm(tuple(whole))
            + self.over_tensor(
                ops.reshape(self.optimizer.squared_norm(tuple(slices)), (1,)) + of_experts
            )[0]
        )
        if self.any_pieces:
            total = (
                total
                + self.over_world(ops.reshape(self.optimizer.squared_norm(tuple(pieces)), (1,)))[0]
            )
        return tuple(reduced), ops.sqrt(total)


def gathers(optimizer: AdamW, topology: Topology, communicator: HcclOperators) -> List[nn.Cell]:
    """What makes each parameter of the pieces that the ranks have updated; nothing where it is
    updated whole.
    """
    cells: List[nn.Cell] = []
    for parameter, piece in zip(optimizer.parameters, optimizer.pieces):
        if piece is None:
            cells.append(nn.Identity())
        else:
            ranks = holders(parameter, topology, communicator.rank)
            cells.append(_GatherPieces(communicator, ranks, piece.cut.axis))
    return cells


class _Sum(nn.Cell):
    """The sum over some ranks; with a piece, each gets its block of an axis."""

    def __init__(
        self, communicator: HcclOperators, ranks: Tuple[int, ...], piece: Optional[Piece] = None
    ) -> None:
        super().__init__()
        self.axis = 0
        self.sum = nn.Identity()
        if piece is not None:
            self.axis = piece.cut.axis
            self.sum = communicator.scattering(ranks)
        elif len(ranks) > 1:
            self.sum = communicator.summing(ranks)

    def construct(self, x: Tensor) -> Tensor:
        return with_axis_first(self.sum(with_axis_first(x, self.axis)), self.axis)


class _GatherPieces(nn.Cell):
    """The blocks of all ranks, along an axis."""

    def __init__(self, communicator: HcclOperators, ranks: Tuple[int, ...], axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.gather = communicator.gathering(ranks)

    def construct(self, piece: Tensor) -> Tensor:
        return with_axis_first(self.gather(with_axis_first(piece, self.axis)), self.axis)
