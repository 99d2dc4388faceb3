"""What comes after the backward pass in the compiled step of a job: gradients reduced over ranks,
and their norm.

As parallel/gradients.py, with operators that a graph can hold. All groups are made here, in the
same order on all ranks.
"""

from __future__ import annotations

from typing import Optional, Tuple

from mindspore import Tensor, nn, ops

from pangu_locmoe.parallel.buckets import SumGradients
from pangu_locmoe.parallel.gradients import gradient_factor, kinds
from pangu_locmoe.parallel.hccl import HcclOperators
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
        self.sum = SumGradients(parameters, optimizer.pieces, topology, communicator, in_graph=True)
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
        summed = self.sum(gradients)
        reduced = []
        whole = []
        slices = []
        experts = []
        pieces = []
        for index in range(self.count):
            scale = self.factors[index] if factor is None else self.factors[index] * factor
            gradient = summed[index] * scale
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


class _Sum(nn.Cell):
    """The sum over some ranks."""

    def __init__(self, communicator: HcclOperators, ranks: Tuple[int, ...]) -> None:
        super().__init__()
        self.sum = communicator.summing(ranks) if len(ranks) > 1 else nn.Identity()

    def construct(self, x: Tensor) -> Tensor:
        return self.sum(x)
