"""Copies of an expert on different ranks, for engines whose ranks cannot hold one twice.

Two copies on one rank balance nothing: its tokens are the same.

Letters: L layers, R ranks, E experts, P slots (of all ranks, or of one).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.expert_load.placement.costs import Ints


def spread_copies(
    expert_of_slot_LP: Ints, load_LE: NDArray[Any], num_ranks: int, num_nodes: int
) -> Ints:
    """The same placement with no rank that holds an expert twice, if its slots are no more than the
    experts.

    A second copy is exchanged with another rank's expert: within the node if that is possible,
    with the most equal load. Where no rank can take it, it becomes a copy of the hottest
    expert that its rank lacks.

    Args:
        expert_of_slot_LP: int64; rank r holds the r-th contiguous block of slots.
        load_LE: of each expert, any unit.
        num_ranks, num_nodes: ranks are numbered node by node.
    """
    spread_LRP = expert_of_slot_LP.reshape(len(expert_of_slot_LP), num_ranks, -1).copy()
    node_R = np.arange(num_ranks) * num_nodes // num_ranks
    for expert_RP, load_E in zip(spread_LRP, load_LE):
        for rank, expert_P in enumerate(expert_RP):
            if len(expert_P) > len(load_E):
                continue
            for slot, expert in enumerate(expert_P):
                if expert in expert_P[:slot]:
                    _move_copy(expert_RP, rank, slot, load_E, node_R)
    return spread_LRP.reshape(expert_of_slot_LP.shape)


def _move_copy(
    expert_RP: Ints, rank: int, slot: int, load_E: NDArray[Any], node_R: NDArray[Any]
) -> None:
    """Put another expert into the slot of a rank that holds its expert twice."""
    expert = expert_RP[rank, slot]
    each_E = load_E / np.maximum(np.bincount(expert_RP.ravel(), minlength=len(load_E)), 1)
    held_E = np.isin(np.arange(len(load_E)), expert_RP[rank])
    fits_RP = ~(expert_RP == expert).any(axis=1)[:, None] & ~held_E[expert_RP]
    if not fits_RP.any():
        expert_RP[rank, slot] = np.where(held_E, -np.inf, each_E).argmax()
        return
    near_RP = fits_RP & (node_R == node_R[rank])[:, None]
    difference_RP = np.abs(each_E[expert_RP] - each_E[expert])
    best = np.where(near_RP if near_RP.any() else fits_RP, difference_RP, np.inf).argmin()
    other = np.unravel_index(best, expert_RP.shape)
    expert_RP[rank, slot], expert_RP[other] = expert_RP[other], expert
