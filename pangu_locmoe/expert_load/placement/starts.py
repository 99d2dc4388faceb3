"""Where the search starts from.

`nodes_first` decides which node an expert belongs to and then, as EPLB does, its rank;
`copy_by_copy` puts one copy after the other where it costs least. EPLB does not know which node is
which, so `align` renames the nodes and ranks of a placement to those that send it most and hold
most of it already. `extend` keeps a placement and fills new slots.

Letters: L layers (in `align` also each layer's nodes, one after the other), N nodes, R ranks, E
experts (or those of a node), P slots (or those of a node or of a rank), J expert groups, X nodes,
or ranks of a node.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import numpy as np

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.placement.costs import Floats, Ints, holdings
from pangu_locmoe.expert_load.placement.eplb import copy_hottest, fill_nodes
from pangu_locmoe.expert_load.placement.problem import Problem
from pangu_locmoe.expert_load.placement.search import Work, improve

KICK_CHANGES = 4


def nodes_first(
    problem: Problem, num_slots: int, num_expert_groups: Optional[int] = None, visiting: int = 0
) -> Ints:
    """The experts' (or groups') nodes as a placement problem of its own, each node one rank; then
    EPLB's way to copies and ranks.

    Args:
        num_slots: P, over all ranks.
        num_expert_groups: J; None: every expert may be in any node.
        visiting: slots of each node for copies of other nodes' experts, those it sends most rows
            to; the node's further spare slots go to second copies of what it has.
    """
    num_layers, num_nodes, num_experts = problem.load_LNE.shape
    num_items = num_expert_groups or num_experts
    if num_items % num_nodes:
        return copy_by_copy(problem, num_slots)
    size = num_experts // num_items
    load_LNJ = problem.load_LNE.reshape(num_layers, num_nodes, num_items, size).sum(axis=3)
    held_LNJ = (
        problem.held_LRE.reshape(num_layers, num_nodes, -1, num_items, size).any(axis=2).all(axis=3)
    )
    seconds = problem.costs.token_seconds * num_nodes / problem.num_ranks
    per_group = problem.costs.expert_bytes * size
    upper = Problem(
        load_LNJ,
        held_LNJ,
        num_nodes,
        replace(problem.costs, token_seconds=seconds, expert_bytes=per_group),
    )
    item_LNP = improve(upper, copy_by_copy(upper, num_items), Work(150_000)).reshape(
        num_layers, num_nodes, -1
    )
    expert_LNE = (item_LNP[:, :, :, None] * size + np.arange(size)).reshape(
        num_layers, num_nodes, -1
    )
    home_LNE = holdings(expert_LNE.reshape(num_layers, -1), num_nodes, num_experts)
    away_LNE = np.where(home_LNE, -1.0, problem.load_LNE)
    expert_LNE = np.concatenate(
        (expert_LNE, np.argsort(-away_LNE, axis=2, kind="stable")[:, :, :visiting]), axis=2
    )
    # A home also computes the rows of the nodes that the expert does not visit.
    local_LNE = np.where(
        holdings(expert_LNE.reshape(num_layers, -1), num_nodes, num_experts), problem.load_LNE, 0.0
    )
    weight_LNE = local_LNE + np.where(
        home_LNE, (problem.load_LNE - local_LNE).sum(axis=1, keepdims=True), 0.0
    )
    expert_of_slot_LP, _ = fill_nodes(
        np.take_along_axis(weight_LNE, expert_LNE, axis=2), expert_LNE, num_slots, problem.num_ranks
    )
    return align(expert_of_slot_LP, problem)


def copy_by_copy(problem: Problem, num_slots: int) -> Ints:
    """The heaviest copy first, each to the rank with room where load, crossing rows and moving
    cost least together.
    """
    load_LNE = problem.load_LNE
    costs = problem.costs
    num_layers, num_nodes, _ = load_LNE.shape
    num_ranks = problem.num_ranks
    room = num_slots // problem.num_ranks
    load_LE = load_LNE.sum(axis=1)
    expert_LP, _, copies_LE = copy_hottest(load_LE, num_slots)
    rows_L = np.arange(num_layers)
    row_L1 = np.arange(num_layers)[:, None]
    node_R = np.arange(num_ranks) * num_nodes // num_ranks
    copy_LP = (load_LE / copies_LE)[row_L1, expert_LP]
    rank_load_LR = np.zeros((num_layers, num_ranks))
    used_LR = np.zeros((num_layers, num_ranks), dtype=np.int64)
    home_LNE = np.zeros(load_LNE.shape, dtype=bool)
    expert_of_slot_LRP = np.empty((num_layers, num_ranks, room), dtype=np.int64)
    for slot_L in np.argsort(-copy_LP, axis=1, kind="stable").T:
        expert_L = expert_LP[rows_L, slot_L]
        copy_L = copy_LP[rows_L, slot_L]
        kept_LN = np.where(home_LNE[rows_L, :, expert_L], 0.0, load_LNE[rows_L, :, expert_L])
        price_LR = costs.token_seconds * rank_load_LR - costs.row_seconds * kept_LN[:, node_R]
        price_LR -= costs.move_seconds * problem.held_LRE[rows_L, :, expert_L]
        rank_L = np.where(used_LR < room, price_LR, np.inf).argmin(axis=1)
        expert_of_slot_LRP[rows_L, rank_L, used_LR[rows_L, rank_L]] = expert_L
        rank_load_LR[rows_L, rank_L] += copy_L
        used_LR[rows_L, rank_L] += 1
        home_LNE[rows_L, node_R[rank_L], expert_L] = True
    return expert_of_slot_LRP.reshape(num_layers, num_slots)


def align(expert_of_slot_LP: Ints, problem: Problem) -> Ints:
    """The same placement with its nodes renamed to keep most tokens and experts, then the ranks
    of each node to keep most experts.
    """
    num_layers, num_nodes, num_experts = problem.load_LNE.shape
    per_node = problem.num_ranks // num_nodes
    in_node_LNE = holdings(expert_of_slot_LP, num_nodes, num_experts).astype(np.float64)
    held_LNE = problem.held_LRE.reshape(num_layers, num_nodes, per_node, num_experts).any(axis=2)
    worth_LNE = problem.costs.row_seconds * problem.load_LNE + problem.costs.move_seconds * held_LNE
    node_LN = _match(in_node_LNE @ worth_LNE.swapaxes(1, 2))
    blocks = expert_of_slot_LP.reshape(num_layers, num_nodes, -1)[
        np.arange(num_layers)[:, None], node_LN
    ].reshape(num_layers, -1)
    shape = (num_layers * num_nodes, per_node, num_experts)
    in_rank_LRE = holdings(blocks, problem.num_ranks, num_experts).reshape(shape).astype(np.float64)
    held_LRE = problem.held_LRE.reshape(shape).astype(np.float64)
    rank_LR = _match(in_rank_LRE @ held_LRE.swapaxes(1, 2))
    return blocks.reshape(len(rank_LR), per_node, -1)[
        np.arange(len(rank_LR))[:, None], rank_LR
    ].reshape(num_layers, -1)


def _match(gain_LXX: Floats) -> Ints:
    """Greedily the largest gains first: for each column the row that is matched with it, int64 [L,
    X].
    """
    num_rows, num_parts, _ = gain_LXX.shape
    row_LX = np.empty((num_rows, num_parts), dtype=np.int64)
    rows_L = np.arange(num_rows)
    left = gain_LXX.copy()
    for _ in range(num_parts):
        row_L, column_L = np.divmod(left.reshape(num_rows, -1).argmax(axis=1), num_parts)
        row_LX[rows_L, column_L] = row_L
        left[rows_L, row_L], left[rows_L, :, column_L] = -np.inf, -np.inf
    return row_LX


def extend(current_LP: Ints, load_LE: Floats, num_ranks: int, num_slots: int) -> Ints:
    """The current placement with more slots: each rank keeps what it holds, its new slots get the
    experts with most load per copy.

    Raises DataError if there are fewer slots than now or the ranks do not divide them.
    """
    num_layers, num_now = current_LP.shape
    if num_slots < num_now or num_now % num_ranks:
        raise DataError(
            f"the current placement has {num_now} slots on {num_ranks} ranks; {num_slots} "
            "cannot keep them"
        )
    blocks = [current_LP.reshape(num_layers, num_ranks, -1).astype(np.int64)]
    copies_LE = np.stack(
        [
            np.bincount(expert_of_slot_P, minlength=load_LE.shape[1])
            for expert_of_slot_P in current_LP
        ]
    )
    rows_L = np.arange(num_layers)
    for _ in range((num_slots - num_now) // num_ranks):
        added_LR = np.empty((num_layers, num_ranks), dtype=np.int64)
        for rank in range(num_ranks):
            added_LR[:, rank] = (load_LE / np.maximum(copies_LE, 1e-9)).argmax(axis=1)
            copies_LE[rows_L, added_LR[:, rank]] += 1
        blocks.append(added_LR[:, :, None])
    return np.concatenate(blocks, axis=2).reshape(num_layers, num_slots)


def kick(expert_of_slot_LP: Ints, num_experts: int, generator: np.random.Generator) -> Ints:
    """The same with some pairs of slots exchanged at random and, where there are spare copies,
    some given to other experts.
    """
    expert_of_slot_LP, rows_L = expert_of_slot_LP.copy(), np.arange(len(expert_of_slot_LP))
    for _ in range(KICK_CHANGES):
        first_L, second_L = generator.integers(
            0, expert_of_slot_LP.shape[1], (2, len(expert_of_slot_LP))
        )
        expert_of_slot_LP[rows_L, first_L], expert_of_slot_LP[rows_L, second_L] = (
            expert_of_slot_LP[rows_L, second_L],
            expert_of_slot_LP[rows_L, first_L],
        )
        if expert_of_slot_LP.shape[1] > num_experts:
            spare_L = (expert_of_slot_LP == expert_of_slot_LP[rows_L, first_L][:, None]).sum(
                axis=1
            ) > 1
            expert_of_slot_LP[rows_L, first_L] = np.where(
                spare_L,
                generator.integers(0, num_experts, len(expert_of_slot_LP)),
                expert_of_slot_LP[rows_L, first_L],
            )
    return expert_of_slot_LP
