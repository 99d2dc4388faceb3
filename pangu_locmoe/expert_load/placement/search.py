"""Local search: exchange two slots' experts, or give a spare copy's slot to another expert, while
that shortens the step.

All layers are searched at once: each round takes the best move of every layer. A layer's move is
made only if the exact value falls, so where scores are estimates (see exchange.py) they only choose
what is evaluated.

Letters: L layers being searched, N nodes, R ranks, E experts, P slots (all, those that may start an
exchange, or those to give away), I moves, X experts to copy, or nodes, or ranks.
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


def improve(problem: Problem, initial_LP: Ints, work: Work) -> Ints:
    """Follow the best move of each layer until none has one or the work is spent.

    Only a move that touches the slowest rank or the busiest node can shorten either, so those slots
    come first; when they have nothing left to give, every slot may move (it can still save
    migration or break a tie).

    Args:
        problem: loads, prices and limits of these layers.
        initial_LP: where to start; must respect problem.allowed_LNE.
        work: is spent.

    Returns:
        int64 [L, P].
    """
    expert_of_slot_LP = initial_LP.copy()
    num_layers, num_slots = expert_of_slot_LP.shape
    for every_slot in (True,) if num_layers * num_slots**2 <= FULL_SEARCH else (False, True):
        active_L = np.arange(num_layers)
        while len(active_L) and work.left > 0:
            expert_of_slot_LP[active_L], better_L = _round(
                problem.rows(active_L), expert_of_slot_LP[active_L], every_slot, work
            )
            active_L = active_L[better_L]
    return expert_of_slot_LP


def _round(
    problem: Problem, expert_of_slot_LP: Ints, every_slot: bool, work: Work
) -> Tuple[Ints, np.ndarray]:
    """The best move of each layer, made where it lowers the value: slots [L, P] and whether it
    did, bool [L].
    """
    now = problem.evaluate(expert_of_slot_LP)
    bound_L = value_of(now, problem.costs) * (1 - 1e-9)
    spare = expert_of_slot_LP.shape[1] > problem.load_LNE.shape[2]
    start_LP = (
        np.tile(np.arange(expert_of_slot_LP.shape[1]), (len(expert_of_slot_LP), 1))
        if every_slot
        else _bottleneck(now, expert_of_slot_LP.shape[1])
    )
    work.left -= start_LP.size * expert_of_slot_LP.shape[1]
    best_LP, best_L = _best(
        problem,
        _exchanges(problem, expert_of_slot_LP, now, start_LP, EXACT_EXCHANGES if spare else 1),
        work,
    )
    better_L = best_L < bound_L
    stuck_L = np.flatnonzero(~better_L)
    if spare and len(stuck_L):
        part = problem.rows(stuck_L)
        best_LP[stuck_L], best_L[stuck_L] = _best(
            part, _replacements(part, expert_of_slot_LP[stuck_L]), work
        )
        better_L = best_L < bound_L
    return np.where(better_L[:, None], best_LP, expert_of_slot_LP), better_L


def _best(problem: Problem, moves_LIP: Ints, work: Work) -> Tuple[Ints, Floats]:
    """The best of I placements of each layer, evaluated exactly, and its value."""
    num_rows, num_moves, num_slots = moves_LIP.shape
    rows_L = np.arange(num_rows)
    work.left -= num_rows * num_moves * problem.load_LNE[0].size // 4
    value_LI = (
        problem.rows(np.repeat(rows_L, num_moves))
        .value(moves_LIP.reshape(-1, num_slots))
        .reshape(num_rows, num_moves)
    )
    best_L = value_LI.argmin(axis=1)
    return moves_LIP[rows_L, best_L], value_LI[rows_L, best_L]


def _exchanges(
    problem: Problem, expert_of_slot_LP: Ints, now: Evaluation, start_LP: Ints, num_moves: int
) -> Ints:
    """The placements after the exchanges of two slots that score best, int64 [L, I, P]."""
    num_rows, num_slots = expert_of_slot_LP.shape
    score_LX = score_exchanges(problem, expert_of_slot_LP, now, start_LP).reshape(num_rows, -1)
    num_moves = min(num_moves, score_LX.shape[1])
    chosen_LI = (
        np.argpartition(score_LX, num_moves - 1, axis=1)[:, :num_moves]
        if num_moves > 1
        else score_LX.argmin(axis=1)[:, None]
    )
    row_L1 = np.arange(num_rows)[:, None]
    move_I = np.arange(num_moves)
    first_LI = start_LP[row_L1, chosen_LI // num_slots]
    second_LI = np.where(
        np.isfinite(score_LX[row_L1, chosen_LI]), chosen_LI % num_slots, first_LI
    )  # not allowed: no move
    moves_LIP = np.repeat(expert_of_slot_LP[:, None], num_moves, axis=1)
    moves_LIP[row_L1, move_I, first_LI] = expert_of_slot_LP[row_L1, second_LI]
    moves_LIP[row_L1, move_I, second_LI] = expert_of_slot_LP[row_L1, first_LI]
    return moves_LIP


def _bottleneck(now: Evaluation, num_slots: int) -> Ints:
    """The slots of the slowest rank and of the busiest node, int64 [L, P]; some may occur twice."""
    parts = []
    for size_LX in (now.load_LR, np.maximum(now.in_LN, now.out_LN)):
        if size_LX.shape[1] > 1:
            width = num_slots // size_LX.shape[1]
            parts.append(size_LX.argmax(axis=1)[:, None] * width + np.arange(width))
    return (
        np.concatenate(parts, axis=1)
        if parts
        else np.tile(np.arange(num_slots), (len(now.load_LR), 1))
    )


def _replacements(problem: Problem, expert_of_slot_LP: Ints) -> Ints:
    """The placements after giving a slot whose expert has other copies to another expert, int64 [L,
    I, P].

    Worth a copy: the experts that weigh most on the slowest rank and on the busiest node's link.
    Given away: the least loaded slots.
    """
    now = problem.evaluate(expert_of_slot_LP)
    costs = problem.costs
    (num_rows, num_slots), num_nodes = expert_of_slot_LP.shape, problem.load_LNE.shape[1]
    rows_L = np.arange(num_rows)
    row_L1 = np.arange(num_rows)[:, None]
    busiest_L = np.maximum(now.in_LN, now.out_LN).argmax(axis=1)
    load_LE = problem.load_LNE[rows_L, busiest_L]
    copies_LE = now.copies_LNE[rows_L, busiest_L]
    wish_LE = costs.row_seconds * (
        np.where(copies_LE == 0, load_LE, 0.0) + copies_LE * now.inbound_LE
    )
    width = num_slots // problem.num_ranks
    slowest_LP = now.load_LR.argmax(axis=1)[:, None] * width + np.arange(width)
    wish_LE[row_L1, expert_of_slot_LP[row_L1, slowest_LP]] += (
        costs.token_seconds * now.slot_load_LP[row_L1, slowest_LP]
    )
    expert_LX = np.argsort(-wish_LE, axis=1)[:, :COPIED_EXPERTS]

    spare_LP = now.copies_LNE.sum(axis=1)[row_L1, expert_of_slot_LP] > 1
    slot_LP = np.argsort(np.where(spare_LP, now.slot_load_LP, np.inf), axis=1)[:, :GIVEN_SLOTS]
    allowed_LPX = np.repeat(spare_LP[row_L1, slot_LP][:, :, None], expert_LX.shape[1], axis=2)
    if problem.allowed_LNE is not None:
        node_LP = slot_LP * num_nodes // num_slots
        allowed_LPX &= problem.allowed_LNE[
            row_L1[:, :, None], node_LP[:, :, None], expert_LX[:, None]
        ]
    new_LPX = np.where(
        allowed_LPX, expert_LX[:, None], expert_of_slot_LP[row_L1, slot_LP][:, :, None]
    )
    moves_LIP = np.repeat(expert_of_slot_LP[:, None], new_LPX[0].size, axis=1)
    move_I = np.arange(new_LPX[0].size)
    moves_LIP[row_L1, move_I, np.repeat(slot_LP, new_LPX.shape[2], axis=1)] = new_LPX.reshape(
        num_rows, -1
    )
    return moves_LIP
