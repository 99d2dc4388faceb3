"""Gradients across ranks: dense ones averaged over the world, an expert's over the ranks that hold it.

Every rank's loss is the mean over its own tokens, and the loss of the job the mean over ranks. An expert's gradient on
one rank already sums what the tokens of its whole expert-parallel group contribute.
"""

from __future__ import annotations

from typing import List, Sequence

from mindspore import Parameter, Tensor, ops

from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.topology import Topology


def is_expert(parameter: Parameter) -> bool:
    """Whether a parameter belongs to experts, of which each rank of an expert-parallel group holds its own."""
    return ".moe.experts." in parameter.name


def reduce_gradients(
    gradients: Sequence[Tensor], parameters: Sequence[Parameter], topology: Topology, communicator: Communicator
) -> List[Tensor]:
    """The gradients of the job's loss, for this rank's parameters."""
    world, replicas = range(topology.num_ranks), topology.expert_replicas(communicator.rank)
    share = 1.0 / topology.num_ranks
    return [
        communicator.all_reduce(gradient, replicas if is_expert(parameter) else world) * share
        for gradient, parameter in zip(gradients, parameters)
    ]


def squared_norm(dense: Tensor, experts: Tensor, topology: Topology, communicator: Communicator) -> Tensor:
    """Squared norm of the whole gradient from its dense part, equal on all ranks, and this rank's experts' part."""
    return dense + communicator.all_reduce(ops.reshape(experts, (1,)), topology.expert_group(communicator.rank))[0]
