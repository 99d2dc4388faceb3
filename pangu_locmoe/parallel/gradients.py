"""Gradients across ranks: whole parameters averaged over the world, a slice or an expert over the ranks that hold the same.

Every rank's loss is the mean over its place's tokens, and the loss of the job the mean over places. An expert's gradient on
one rank already sums what the tokens of its whole expert-parallel group contribute.
"""

from __future__ import annotations

from typing import List, Sequence, Tuple

from mindspore import Parameter, Tensor, ops

from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.tensor import cut_of
from pangu_locmoe.parallel.topology import Topology


def is_expert(parameter: Parameter) -> bool:
    """Whether a parameter belongs to experts, of which each rank of an expert-parallel group holds its own."""
    return ".moe.experts." in parameter.name


KINDS = ("whole", "slice", "expert")


def kind(parameter: Parameter) -> str:
    """One of KINDS: whole on all ranks, divided over each place, or an expert's."""
    if is_expert(parameter):
        return "expert"
    return "whole" if cut_of(parameter) is None else "slice"


def holders(parameter: Parameter, topology: Topology, rank: int) -> Tuple[int, ...]:
    """The ranks that hold the same of a parameter as this one.

    The ranks of a place have the same gradient of a parameter that is whole on all of them; it is averaged over them as well, so
    that they stay the same to the last bit.
    """
    if kind(parameter) == "expert":
        return topology.expert_replicas(rank)
    return tuple(range(topology.num_ranks)) if kind(parameter) == "whole" else topology.same_part(rank)


def share(parameter: Parameter, topology: Topology) -> float:
    """What the sum over `holders` is multiplied by: one over the places, or over the ranks where all of them add the same."""
    return 1.0 / (topology.num_ranks if kind(parameter) == "whole" else topology.num_places)


def reduce_gradients(
    gradients: Sequence[Tensor], parameters: Sequence[Parameter], topology: Topology, communicator: Communicator
) -> List[Tensor]:
    """The gradients of the job's loss, for this rank's parameters."""
    return [
        communicator.all_reduce(gradient, holders(parameter, topology, communicator.rank)) * share(parameter, topology)
        for gradient, parameter in zip(gradients, parameters)
    ]


def squared_norm(whole: Tensor, slices: Tensor, experts: Tensor, topology: Topology, communicator: Communicator) -> Tensor:
    """Squared norm of the whole gradient.

    Args:
        whole: of the parameters that are whole on all ranks, fp32 scalar, equal on them.
        slices: of this rank's slices of dense parameters.
        experts: of this rank's experts, or its slices of them.
    """
    experts = communicator.all_reduce(ops.reshape(experts, (1,)), topology.expert_group(communicator.rank))
    return whole + communicator.all_reduce(ops.reshape(slices, (1,)) + experts, topology.tensor_group(communicator.rank))[0]
