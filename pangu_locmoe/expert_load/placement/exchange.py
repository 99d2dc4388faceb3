"""The score of exchanging two slots' experts: for all pairs of all layers at once.

Exact where both experts have one copy. Otherwise it leaves out what the move does to the experts'
other copies.

Letters: B layers being searched, N nodes, R ranks, S slots, A slots that may start an exchange, P
parts (nodes or ranks).
"""

from __future__ import annotations

from typing import Any, Tuple

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.expert_load.placement.costs import Evaluation, Floats, Ints
from pangu_locmoe.expert_load.placement.problem import TIE_WEIGHT, Problem


def score_exchanges(problem: Problem, slots_BS: Ints, now: Evaluation, start_BA: Ints) -> Floats:
    """What each exchange adds to the value of its layer, seconds [B, A, S]; infinite where it is
    not allowed.
    """
    costs = problem.costs
    num_ranks = problem.num_ranks
    num_nodes = problem.load_LNE.shape[1]
    num_slots = slots_BS.shape[1]
    slot_S = np.arange(num_slots)
    rank_S = slot_S * num_ranks // num_slots
    node_S = slot_S * num_nodes // num_slots
    row_B1 = np.arange(len(slots_BS))[:, None]

    # What a copy of slot i's expert brings with it into node n, and what its leaving makes cross.
    source_BSN = problem.load_LNE[row_B1, :, slots_BS]
    copies_BSN = now.copies_LNE[row_B1, :, slots_BS]
    total_BS = copies_BSN.sum(axis=2)
    inbound_BS = now.inbound_LE[row_B1, slots_BS]
    leaves_BS = np.where(copies_BSN[:, slot_S, node_S] == 1, source_BSN[:, slot_S, node_S], 0.0)
    stays_BSN = np.where(copies_BSN == 0, source_BSN, 0.0)
    stays_BSN[:, slot_S, node_S] = leaves_BS
    brings_BSN = ((inbound_BS * total_BS + leaves_BS)[:, :, None] - stays_BSN) / total_BS[
        :, :, None
    ]
    load_BSN = source_BSN / (copies_BSN + 1) + brings_BSN
    load_BSN[:, slot_S, node_S] = now.slot_load_LS

    def at_partner(value_BSP: NDArray[Any], part_S: Ints) -> Tuple[NDArray[Any], NDArray[Any]]:
        """A value of slots by part, for each pair: of the first at the second's part, of the
        second at the first's.
        """
        return np.repeat(
            value_BSP[row_B1, start_BA], num_slots // value_BSP.shape[2], axis=2
        ), np.ascontiguousarray(value_BSP.swapaxes(1, 2))[row_B1, part_S[start_BA]]

    def without(size_BP: Floats, part_S: Ints) -> Floats:
        """The largest of the parts other than the pair's two, [B, A, S]."""
        top_B3 = np.argsort(-size_BP, axis=1)[:, :3]
        size_B3 = np.pad(
            np.take_along_axis(size_BP, top_B3, axis=1), ((0, 0), (0, 3 - top_B3.shape[1]))
        )
        first_B1 = top_B3[:, :1]
        second_B1 = top_B3[:, 1:2] if size_BP.shape[1] > 1 else top_B3[:, :1]
        part_BA = part_S[start_BA]
        hit_BAS = (part_BA == first_B1)[:, :, None] | (part_S == first_B1)[:, None]
        both_BAS = hit_BAS & ((part_BA == second_B1)[:, :, None] | (part_S == second_B1)[:, None])
        size_B311 = size_B3[:, :, None, None]
        return np.where(
            both_BAS, size_B311[:, 2], np.where(hit_BAS, size_B311[:, 1], size_B311[:, 0])
        )

    # Ranks.
    own_BS = now.slot_load_LS
    rank_load_BS = now.load_LR[:, rank_S]
    there_BAS, here_BAS = at_partner(load_BSN, node_S)
    rest_BS = rank_load_BS - own_BS
    first_BAS = rest_BS[row_B1, start_BA][:, :, None] + here_BAS
    second_BAS = rest_BS[:, None] + there_BAS
    score_BAS = costs.token_seconds * np.maximum(
        np.maximum(first_BAS, second_BAS), without(now.load_LR, rank_S)
    )
    before_BAS = (
        np.square(rank_load_BS)[row_B1, start_BA][:, :, None] + np.square(rank_load_BS)[:, None]
    )
    total_B11 = np.maximum(now.load_LR.sum(axis=1), 1e-300)[:, None, None]
    score_BAS += (
        TIE_WEIGHT
        * costs.token_seconds
        * (np.square(first_BAS) + np.square(second_BAS) - before_BAS)
        / total_B11
    )

    # Nodes.
    if num_nodes > 1 and costs.row_seconds > 0:
        (brings1_BAS, brings2_BAS), (stays1_BAS, stays2_BAS) = (
            at_partner(brings_BSN, node_S),
            at_partner(stays_BSN, node_S),
        )
        in_BS = now.in_LN[:, node_S] - inbound_BS
        out_BS = now.out_LN[:, node_S] + leaves_BS
        first_BAS = np.maximum(
            in_BS[row_B1, start_BA][:, :, None] + brings2_BAS,
            out_BS[row_B1, start_BA][:, :, None] - stays2_BAS,
        )
        second_BAS = np.maximum(in_BS[:, None] + brings1_BAS, out_BS[:, None] - stays1_BAS)
        busy_BN = np.maximum(now.in_LN, now.out_LN)
        after_BAS = np.maximum(np.maximum(first_BAS, second_BAS), without(busy_BN, node_S))
        same_BAS = node_S[start_BA][:, :, None] == node_S
        score_BAS += costs.row_seconds * np.where(
            same_BAS, busy_BN.max(axis=1)[:, None, None], after_BAS
        )
        fewer_BAS = (
            stays1_BAS + stays2_BAS - leaves_BS[row_B1, start_BA][:, :, None] - leaves_BS[:, None]
        )
        score_BAS -= TIE_WEIGHT / num_nodes * costs.row_seconds * fewer_BAS

    # Moves.
    if costs.move_seconds > 0:
        new_BSR = (~problem.held_LRE)[row_B1, :, slots_BS].astype(np.float64)
        new1_BAS, new2_BAS = at_partner(new_BSR, rank_S)
        now_new_BS = new_BSR[:, slot_S, rank_S]
        score_BAS += costs.move_seconds * (
            new1_BAS + new2_BAS - now_new_BS[row_B1, start_BA][:, :, None] - now_new_BS[:, None]
        )

    np.copyto(score_BAS, np.inf, where=rank_S[start_BA][:, :, None] == rank_S)
    if problem.allowed_LNE is not None:
        allowed1_BAS, allowed2_BAS = at_partner(problem.allowed_LNE[row_B1, :, slots_BS], node_S)
        score_BAS[~(allowed1_BAS & allowed2_BAS)] = np.inf
    return score_BAS
