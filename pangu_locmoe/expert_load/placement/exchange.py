"""The score of exchanging two slots' experts: for all pairs of all layers at once.

Exact where both experts have one copy. Otherwise it leaves out what the move does to the experts'
other copies.

Letters: L layers being searched, N nodes, R ranks, E experts, P slots (the first P of two: those
that may start an exchange), X nodes or ranks.
"""

from __future__ import annotations

from typing import Any, Tuple

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.expert_load.placement.costs import Evaluation, Floats, Ints
from pangu_locmoe.expert_load.placement.problem import TIE_WEIGHT, Problem


def score_exchanges(
    problem: Problem, expert_of_slot_LP: Ints, now: Evaluation, start_LP: Ints
) -> Floats:
    """What each exchange adds to the value of its layer, seconds [L, P, P]; infinite where it is
    not allowed.
    """
    costs = problem.costs
    num_ranks = problem.num_ranks
    num_nodes = problem.load_LNE.shape[1]
    num_slots = expert_of_slot_LP.shape[1]
    slot_P = np.arange(num_slots)
    rank_P = slot_P * num_ranks // num_slots
    node_P = slot_P * num_nodes // num_slots
    row_L1 = np.arange(len(expert_of_slot_LP))[:, None]

    # What a copy of slot i's expert brings with it into node n, and what its leaving makes cross.
    source_LPN = problem.load_LNE[row_L1, :, expert_of_slot_LP]
    copies_LPN = now.copies_LNE[row_L1, :, expert_of_slot_LP]
    total_LP = copies_LPN.sum(axis=2)
    inbound_LP = now.inbound_LE[row_L1, expert_of_slot_LP]
    leaves_LP = np.where(copies_LPN[:, slot_P, node_P] == 1, source_LPN[:, slot_P, node_P], 0.0)
    stays_LPN = np.where(copies_LPN == 0, source_LPN, 0.0)
    stays_LPN[:, slot_P, node_P] = leaves_LP
    brings_LPN = ((inbound_LP * total_LP + leaves_LP)[:, :, None] - stays_LPN) / total_LP[
        :, :, None
    ]
    load_LPN = source_LPN / (copies_LPN + 1) + brings_LPN
    load_LPN[:, slot_P, node_P] = now.slot_load_LP

    def at_partner(value_LPX: NDArray[Any], part_P: Ints) -> Tuple[NDArray[Any], NDArray[Any]]:
        """A value of slots by part, for each pair: of the first at the second's part, of the
        second at the first's.
        """
        return np.repeat(
            value_LPX[row_L1, start_LP], num_slots // value_LPX.shape[2], axis=2
        ), np.ascontiguousarray(value_LPX.swapaxes(1, 2))[row_L1, part_P[start_LP]]

    def without(size_LX: Floats, part_P: Ints) -> Floats:
        """The largest of the parts other than the pair's two, [L, P, P]."""
        top_L3 = np.argsort(-size_LX, axis=1)[:, :3]
        size_L3 = np.pad(
            np.take_along_axis(size_LX, top_L3, axis=1), ((0, 0), (0, 3 - top_L3.shape[1]))
        )
        first_L1 = top_L3[:, :1]
        second_L1 = top_L3[:, 1:2] if size_LX.shape[1] > 1 else top_L3[:, :1]
        part_LP = part_P[start_LP]
        hit_LPP = (part_LP == first_L1)[:, :, None] | (part_P == first_L1)[:, None]
        both_LPP = hit_LPP & ((part_LP == second_L1)[:, :, None] | (part_P == second_L1)[:, None])
        size_L311 = size_L3[:, :, None, None]
        return np.where(
            both_LPP, size_L311[:, 2], np.where(hit_LPP, size_L311[:, 1], size_L311[:, 0])
        )

    # Ranks.
    own_LP = now.slot_load_LP
    rank_load_LP = now.load_LR[:, rank_P]
    there_LPP, here_LPP = at_partner(load_LPN, node_P)
    rest_LP = rank_load_LP - own_LP
    first_LPP = rest_LP[row_L1, start_LP][:, :, None] + here_LPP
    second_LPP = rest_LP[:, None] + there_LPP
    score_LPP = costs.token_seconds * np.maximum(
        np.maximum(first_LPP, second_LPP), without(now.load_LR, rank_P)
    )
    before_LPP = (
        np.square(rank_load_LP)[row_L1, start_LP][:, :, None] + np.square(rank_load_LP)[:, None]
    )
    total_L11 = np.maximum(now.load_LR.sum(axis=1), 1e-300)[:, None, None]
    score_LPP += (
        TIE_WEIGHT
        * costs.token_seconds
        * (np.square(first_LPP) + np.square(second_LPP) - before_LPP)
        / total_L11
    )

    # Nodes.
    if num_nodes > 1 and costs.row_seconds > 0:
        (brings1_LPP, brings2_LPP), (stays1_LPP, stays2_LPP) = (
            at_partner(brings_LPN, node_P),
            at_partner(stays_LPN, node_P),
        )
        in_LP = now.in_LN[:, node_P] - inbound_LP
        out_LP = now.out_LN[:, node_P] + leaves_LP
        first_LPP = np.maximum(
            in_LP[row_L1, start_LP][:, :, None] + brings2_LPP,
            out_LP[row_L1, start_LP][:, :, None] - stays2_LPP,
        )
        second_LPP = np.maximum(in_LP[:, None] + brings1_LPP, out_LP[:, None] - stays1_LPP)
        busy_LN = np.maximum(now.in_LN, now.out_LN)
        after_LPP = np.maximum(np.maximum(first_LPP, second_LPP), without(busy_LN, node_P))
        same_LPP = node_P[start_LP][:, :, None] == node_P
        score_LPP += costs.row_seconds * np.where(
            same_LPP, busy_LN.max(axis=1)[:, None, None], after_LPP
        )
        fewer_LPP = (
            stays1_LPP + stays2_LPP - leaves_LP[row_L1, start_LP][:, :, None] - leaves_LP[:, None]
        )
        score_LPP -= TIE_WEIGHT / num_nodes * costs.row_seconds * fewer_LPP

    # Moves.
    if costs.move_seconds > 0:
        new_LPR = (~problem.held_LRE)[row_L1, :, expert_of_slot_LP].astype(np.float64)
        new1_LPP, new2_LPP = at_partner(new_LPR, rank_P)
        now_new_LP = new_LPR[:, slot_P, rank_P]
        score_LPP += costs.move_seconds * (
            new1_LPP + new2_LPP - now_new_LP[row_L1, start_LP][:, :, None] - now_new_LP[:, None]
        )

    np.copyto(score_LPP, np.inf, where=rank_P[start_LP][:, :, None] == rank_P)
    if problem.allowed_LNE is not None:
        allowed1_LPP, allowed2_LPP = at_partner(
            problem.allowed_LNE[row_L1, :, expert_of_slot_LP], node_P
        )
        score_LPP[~(allowed1_LPP & allowed2_LPP)] = np.inf
    return score_LPP
