"""Gradients across ranks: whole parameters averaged over the world, a slice or an expert over the
ranks that hold the same.

Every rank's loss is the mean over its place's tokens, and the loss of the job the mean over places.
An expert's gradient on one rank already sums what the tokens of its whole expert-parallel group
contribute.

With parallel.shard_optimizer the ranks that hold the same of a parameter divide the work on it
(ZeRO stage 1, Rajbhandari et al. 2020): each gets a piece of the averaged gradient, keeps the
moments of that piece, updates it, and the pieces are gathered. A piece is a block of the first axis
that can be divided, and a parameter with none stays whole.

What is added up on which way is in buckets.py.
"""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

from mindspore import Parameter, Tensor, ops

from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.tensor import Cut, Piece, cut_of, has_partial_gradient
from pangu_locmoe.parallel.topology import Topology


def is_expert(parameter: Parameter) -> bool:
    """Whether a parameter belongs to experts, of which each rank of an expert-parallel group
    holds its own.
    """
    return ".moe.experts." in parameter.name


KINDS = ("whole", "slice", "expert", "piece")
"""Of the gradients that a rank has after the reduction; only the first is the same on all ranks."""


def kind(parameter: Parameter) -> str:
    """whole on all ranks, a slice divided over each replica, or an expert's."""
    if is_expert(parameter):
        return "expert"
    return "whole" if cut_of(parameter) is None else "slice"


def kinds(parameters: Sequence[Parameter], pieces: Sequence[Optional[Piece]]) -> List[str]:
    """One of KINDS for each parameter's reduced gradient."""
    return [
        kind(parameter) if own is None else "piece" for parameter, own in zip(parameters, pieces)
    ]


def holders(parameter: Parameter, topology: Topology, rank: int) -> Tuple[int, ...]:
    """The ranks that hold the same of a parameter as this one."""
    return holders_of(kind(parameter), topology, rank)


def holders_of(kind: str, topology: Topology, rank: int) -> Tuple[int, ...]:
    """The ranks that hold the same of a parameter of this kind.

    The ranks of a replica have the same gradient of a parameter that is whole on all of them; it is
    averaged over them as well, so that they stay the same to the last bit.
    """
    if kind == "expert":
        return topology.same_experts(rank)
    return tuple(range(topology.num_ranks)) if kind == "whole" else topology.same_part(rank)


def gradient_factor(parameter: Parameter, topology: Topology) -> float:
    """What the sum over `holders` is multiplied by: one over the replicas, or over the ranks where
    all of them add the same.
    """
    alike = kind(parameter) == "whole" and not has_partial_gradient(parameter)
    return 1.0 / (topology.num_ranks if alike else topology.num_replicas)


def piece(shape: Sequence[int], kind: str, topology: Topology, rank: int) -> Optional[Piece]:
    """What this rank keeps the moments of, where the holders of a parameter divide it; None: of all
    of it.

    Experts are never divided between ranks, each of them is: they may move to other ranks.
    """
    ranks = holders_of(kind, topology, rank)
    if len(ranks) == 1:
        return None
    axes = range(1 if kind == "expert" else 0, len(shape))
    axis = next((axis for axis in axes if shape[axis] % len(ranks) == 0), None)
    return None if axis is None else Piece(Cut(axis), list(ranks).index(rank), len(ranks))


def pieces(parameters: Sequence[Parameter], topology: Topology, rank: int) -> List[Optional[Piece]]:
    """This rank's piece of each parameter."""
    return [piece(parameter.shape, kind(parameter), topology, rank) for parameter in parameters]


def with_axis_first(x: Tensor, axis: int) -> Tensor:
    """`x` with `axis` and the first axis exchanged; doing it twice does nothing."""
    return x if axis == 0 else ops.swapaxes(x, 0, axis)


def squared_norm(
    whole: Tensor,
    slices: Tensor,
    experts: Tensor,
    pieces: Optional[Tensor],
    topology: Topology,
    communicator: Communicator,
) -> Tensor:
    """Squared norm of the whole gradient.

    Args:
        whole: of the parameters that are whole on all ranks, fp32 scalar, equal on them.
        slices: of this rank's slices of dense parameters.
        experts: of this rank's experts, or its slices of them.
        pieces: of this rank's pieces of what several ranks hold, which the others do not count;
            None: there are none.
    """
    experts = communicator.all_reduce(
        ops.reshape(experts, (1,)), topology.expert_group(communicator.rank)
    )
    total = (
        whole
        + communicator.all_reduce(
            ops.reshape(slices, (1,)) + experts, topology.tensor_group(communicator.rank)
        )[0]
    )
    if pieces is None:
        return total
    return total + communicator.all_reduce(ops.reshape(pieces, (1,)), range(topology.num_ranks))[0]
