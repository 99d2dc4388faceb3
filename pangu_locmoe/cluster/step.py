"""The training step of one rank of an Ascend job as one graph: forward, backward, reduction, clipping, update."""

from __future__ import annotations

from typing import Dict, Tuple

import mindspore as ms
from mindspore import Tensor, nn, ops

from pangu_locmoe.parallel.gradients import is_expert
from pangu_locmoe.parallel.hccl import HcclOperators, SumOver
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.optimizer import AdamW
from pangu_locmoe.train.step import Objective


class GraphStep(nn.Cell):
    """`FusedStep` for the ranks of a job, whose MoE layers must have constant sizes (moe/static.py).

    Args:
        objective: of this rank's model.
        optimizer: of this rank's parameters.
        topology: who holds what.
        communicator: names the groups. They are made here, in the same order on all ranks.
    """

    def __init__(self, objective: Objective, optimizer: AdamW, topology: Topology, communicator: HcclOperators) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.gradient = ms.value_and_grad(objective, None, optimizer.parameters, has_aux=True)
        rank = communicator.rank
        self.is_expert = [is_expert(parameter) for parameter in optimizer.parameters]
        self.count, self.share = len(self.is_expert), 1.0 / topology.num_ranks
        self.over_world = _sum_over(topology_world(topology), communicator)
        self.over_experts = _sum_over(topology.expert_group(rank), communicator)
        self.over_replicas = _sum_over(topology.expert_replicas(rank), communicator)

    def construct(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        domains_B: Tensor,
        row_keys_T: Tensor,
        column_keys_D: Tensor,
        scale: Tensor,
        learning_rate: Tensor,
        step: Tensor,
    ) -> Tuple[Tensor, Dict[str, Tensor], Tensor]:
        """Returns this rank's losses and statistics, and the norm of the whole gradient."""
        (_, losses, stats), gradients = self.gradient(
            tokens_BS, targets_BS, positions_BS, segments_BS, domains_B, row_keys_T, column_keys_D, scale
        )
        factor = self.share / scale
        reduced = []
        dense = []
        experts = []
        for index in range(self.count):
            if self.is_expert[index]:
                gradient = self.over_replicas(gradients[index]) * factor
                experts.append(gradient)
            else:
                gradient = self.over_world(gradients[index]) * factor
                dense.append(gradient)
            reduced.append(gradient)
        # A rank has its own experts only; the rest of the norm is with the others of its expert-parallel group.
        of_experts = self.over_experts(ops.reshape(self.optimizer.squared_norm(tuple(experts)), (1,)))[0]
        norm = ops.sqrt(self.optimizer.squared_norm(tuple(dense)) + of_experts)
        self.optimizer.update(tuple(reduced), learning_rate, step, norm)
        return losses, stats, norm


class _Alone(nn.Cell):
    """The sum over a group of one."""

    def construct(self, x: Tensor) -> Tensor:
        return x


def topology_world(topology: Topology) -> Tuple[int, ...]:
    """All ranks."""
    return tuple(range(topology.num_ranks))


def _sum_over(ranks: Tuple[int, ...], communicator: HcclOperators) -> nn.Cell:
    return _Alone() if len(ranks) == 1 else SumOver(communicator.group(ranks))
