"""Local search: exchange two slots' experts, or give a spare copy's slot to another expert, while
that shortens the step.

All layers are searched at once: each round takes the best move of every layer. A layer's move is
made only if the exact value falls, so where scores are estimates (see exchange.py) they only choose
what is evaluated.

Letters: B layers being searched, N nodes, E experts, S slots, A slots that may start an exchange, M
moves, X experts to copy, J slots to give away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

import numpy as np

from pangu_locmoe.expert_load.placement.costs import Evaluation, Floats, Ints
from pangu_locmoe.expert_load.placement.exchange import score_exchanges
from pangu_locmoe.expert_load.placement.problem import Problem, value_of

# of each layer evaluated in a round where experts have several copies and scores are estimates
EXACT_EXCHANGES = 32
COPIED_EXPERTS = 8  # of each layer: their product is evaluated in a round where no exchange helps
GIVEN_SLOTS = 12
FULL_SEARCH = (
    50_000  # pairs of slots over all layers up to which every pair is a candidate from the start
)


@dataclass
class Work:
    """What is left to spend, in scored pairs of slots: about 0.05 us each.

    Counted, not timed: the same input gives the same plan.
    """

    left: int = 300_000


def improve(problem: Problem, slot_to_expert_LS: Ints, work: Work) -> Ints:
    """Follow the best move of each layer until none has one or the work is spent.

    Only a move that touches the slowest rank or the busiest node can shorten either, so those slots
    come first; when they have nothing left to give, every slot may move (it can still save
    migration or break a tie).

    Args:
        problem: loads, prices and limits of these layers.
        slot_to_expert_LS: where to start; must respect problem.allowed_LNE.
        work: is spent.

    Returns:
        int64 [L, S].
    """
    slots_LS = slot_to_expert_LS.copy()
    num_layers, num_slots = slots_LS.shape
    for every_slot in (True,) if num_layers * num_slots**2 <= FULL_SEARCH else (False, True):
        active_B = np.arange(num_layers)
        while len(active_B) and work.left > 0:
            slots_LS[active_B], better_B = _round(
                problem.rows(active_B), slots_LS[active_B], every_slot, work
            )
            active_B = active_B[better_B]
    return slots_LS


def _round(
    problem: Problem, slots_BS: Ints, every_slot: bool, work: Work
) -> Tuple[Ints, np.ndarray]:
    """The best move of each layer, made where it lowers the value: slots [B, S] and whether it
    did, bool [B].
    """
    now = problem.evaluate(slots_BS)
    bound_B = value_of(now, problem.costs) * (1 - 1e-9)
    spare = slots_BS.shape[1] > problem.load_LNE.shape[2]
    start_BA = (
        np.tile(np.arange(slots_BS.shape[1]), (len(slots_BS), 1))
        if every_slot
        else _bottleneck(now, slots_BS.shape[1])
    )
    work.left -= start_BA.size * slots_BS.shape[1]
    best_BS, best_B = _best(
        problem, _exchanges(problem, slots_BS, now, start_BA, EXACT_EXCHANGES if spare else 1), work
    )
    better_B = best_B < bound_B
    stuck_B = np.flatnonzero(~better_B)
    if spare and len(stuck_B):
        part = problem.rows(stuck_B)
        best_BS[stuck_B], best_B[stuck_B] = _best(
            part, _replacements(part, slots_BS[stuck_B]), work
        )
        better_B = best_B < bound_B
    return np.where(better_B[:, None], best_BS, slots_BS), better_B


def _best(problem: Problem, moves_BMS: Ints, work: Work) -> Tuple[Ints, Floats]:
    """The best of M placements of each layer, evaluated exactly, and its value."""
    num_rows, num_moves, num_slots = moves_BMS.shape
    rows_B = np.arange(num_rows)
    work.left -= num_rows * num_moves * problem.load_LNE[0].size // 4
    value_BM = (
        problem.rows(np.repeat(rows_B, num_moves))
        .value(moves_BMS.reshape(-1, num_slots))
        .reshape(num_rows, num_moves)
    )
    best_B = value_BM.argmin(axis=1)
    return moves_BMS[rows_B, best_B], value_BM[rows_B, best_B]


def _exchanges(
    problem: Problem, slots_BS: Ints, now: Evaluation, start_BA: Ints, num_moves: int
) -> Ints:
    """The placements after the exchanges of two slots that score best, int64 [B, M, S]."""
    num_rows, num_slots = slots_BS.shape
    score_BP = score_exchanges(problem, slots_BS, now, start_BA).reshape(num_rows, -1)
    num_moves = min(num_moves, score_BP.shape[1])
    chosen_BM = (
        np.argpartition(score_BP, num_moves - 1, axis=1)[:, :num_moves]
        if num_moves > 1
        else score_BP.argmin(axis=1)[:, None]
    )
    row_B1 = np.arange(num_rows)[:, None]
    move_M = np.arange(num_moves)
    first_BM = start_BA[row_B1, chosen_BM // num_slots]
    second_BM = np.where(
        np.isfinite(score_BP[row_B1, chosen_BM]), chosen_BM % num_slots, first_BM
    )  # not allowed: no move
    moves_BMS = np.repeat(slots_BS[:, None], num_moves, axis=1)
    moves_BMS[row_B1, move_M, first_BM] = slots_BS[row_B1, second_BM]
    moves_BMS[row_B1, move_M, second_BM] = slots_BS[row_B1, first_BM]
    return moves_BMS


def _bottleneck(now: Evaluation, num_slots: int) -> Ints:
    """The slots of the slowest rank and of the busiest node, int64 [B, A]; some may occur twice."""
    parts = []
    for size_BP in (now.load_LR, np.maximum(now.in_LN, now.out_LN)):
        if size_BP.shape[1] > 1:
            width = num_slots // size_BP.shape[1]
            parts.append(size_BP.argmax(axis=1)[:, None] * width + np.arange(width))
    return (
        np.concatenate(parts, axis=1)
        if parts
        else np.tile(np.arange(num_slots), (len(now.load_LR), 1))
    )


def _replacements(problem: Problem, slots_BS: Ints) -> Ints:
    """The placements after giving a slot whose expert has other copies to another expert, int64 [B,
    M, S].

    Worth a copy: the experts that weigh most on the slowest rank and on the busiest node's link.
    Given away: the least loaded slots.
    """
    now = problem.evaluate(slots_BS)
    costs = problem.costs
    (num_rows, num_slots), num_nodes = slots_BS.shape, problem.load_LNE.shape[1]
    rows_B = np.arange(num_rows)
    row_B1 = np.arange(num_rows)[:, None]
    busiest_B = np.maximum(now.in_LN, now.out_LN).argmax(axis=1)
    load_BE = problem.load_LNE[rows_B, busiest_B]
    copies_BE = now.copies_LNE[rows_B, busiest_B]
    wish_BE = costs.row_seconds * (
        np.where(copies_BE == 0, load_BE, 0.0) + copies_BE * now.inbound_LE
    )
    width = num_slots // problem.num_ranks
    slowest_BJ = now.load_LR.argmax(axis=1)[:, None] * width + np.arange(width)
    wish_BE[row_B1, slots_BS[row_B1, slowest_BJ]] += (
        costs.token_seconds * now.slot_load_LS[row_B1, slowest_BJ]
    )
    expert_BX = np.argsort(-wish_BE, axis=1)[:, :COPIED_EXPERTS]

    spare_BS = now.copies_LNE.sum(axis=1)[row_B1, slots_BS] > 1
    slot_BJ = np.argsort(np.where(spare_BS, now.slot_load_LS, np.inf), axis=1)[:, :GIVEN_SLOTS]
    allowed_BJX = np.repeat(spare_BS[row_B1, slot_BJ][:, :, None], expert_BX.shape[1], axis=2)
    if problem.allowed_LNE is not None:
        node_BJ = slot_BJ * num_nodes // num_slots
        allowed_BJX &= problem.allowed_LNE[
            row_B1[:, :, None], node_BJ[:, :, None], expert_BX[:, None]
        ]
    new_BJX = np.where(allowed_BJX, expert_BX[:, None], slots_BS[row_B1, slot_BJ][:, :, None])
    moves_BMS = np.repeat(slots_BS[:, None], new_BJX[0].size, axis=1)
    move_M = np.arange(new_BJX[0].size)
    moves_BMS[row_B1, move_M, np.repeat(slot_BJ, new_BJX.shape[2], axis=1)] = new_BJX.reshape(
        num_rows, -1
    )
    return moves_BMS
