"""Placement by where the tokens come from: several starts, local search from each, the best of all.

The starts are the current placement, EPLB's and our own (starts.py). The result is never worse than
the current placement or EPLB's by the objective of costs.py, and a layer that would gain nothing
stays as it is.

Letters: L layers, N nodes, R ranks, E experts, P slots, I candidates to choose from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import List, Optional, Sequence

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.placement.costs import Bools, Costs, Ints, holdings
from pangu_locmoe.expert_load.placement.eplb import check_sizes, rebalance
from pangu_locmoe.expert_load.placement.problem import Problem
from pangu_locmoe.expert_load.placement.search import Work, improve
from pangu_locmoe.expert_load.placement.starts import align, copy_by_copy, extend, kick, nodes_first

# times the best found of each layer is changed at random and improved again, how often at once
KICK_ROUNDS = 4
KICKS = 8


def place_by_locality(
    load_LNE: NDArray[np.floating],
    num_ranks: int,
    current_LP: Ints,
    costs: Costs,
    num_slots: Optional[int] = None,
    num_expert_groups: Optional[int] = None,
    starts: Sequence[Ints] = (),
) -> Ints:
    """The placement with the shortest modelled step.

    Args:
        load_LNE: expected token rows of a step by source node and expert.
        num_ranks: R; a multiple of N, numbered node by node.
        current_LP: the placement there is, int [L, P]; may have fewer slots than the result.
        costs: prices.
        num_slots: P of a layer, at least E; more than E: experts get copies. None: as many as the
            current placement.
        num_expert_groups: consecutive runs of experts, each of which must stay within one node;
            None: no such limit.
        starts: further placements [L, P] to start from.

    Returns:
        expert_of_slot int64 [L, P]; each layer is the current one's where nothing is gained.

    Raises:
        DataError: sizes do not fit each other.
    """
    load_LNE = np.asarray(load_LNE, dtype=np.float64)
    _, num_nodes, num_experts = load_LNE.shape
    num_slots = num_slots or current_LP.shape[1]
    check_sizes(num_experts, num_slots, num_expert_groups or 1, num_nodes, num_ranks)
    if num_expert_groups and num_expert_groups % num_nodes:
        raise DataError(
            f"groups ({num_expert_groups}) must be divisible by nodes ({num_nodes}) for each to "
            "stay within a node"
        )
    held_LRE = holdings(current_LP, num_ranks, num_experts)
    problem = Problem(load_LNE, held_LRE, num_ranks, costs)

    # The current placement comes first, so it wins every tie.
    load_LE = load_LNE.sum(axis=1)
    eplb_LP = rebalance(load_LE, num_slots, num_expert_groups or 1, num_nodes, num_ranks)[0]
    kept = [extend(current_LP, load_LE, num_ranks, num_slots), eplb_LP, *starts]
    per_node = (num_slots - num_experts) // num_nodes
    visits = (0,) if num_expert_groups or not per_node else (0, per_node)
    own = [
        align(eplb_LP, problem),
        *(nodes_first(problem, num_slots, num_expert_groups, visiting) for visiting in visits),
    ]
    if num_expert_groups is None:
        own.append(copy_by_copy(problem, num_slots))
    else:
        kept = [
            expert_of_slot_LP
            for expert_of_slot_LP in kept
            if _keeps_groups(expert_of_slot_LP, num_expert_groups, num_nodes, num_experts)
        ]
    return best_of(problem, [*kept, *_search(problem, np.stack([*kept, *own]), num_expert_groups)])


def _search(problem: Problem, starts_ILP: Ints, num_expert_groups: Optional[int]) -> List[Ints]:
    """Local search: in each layer from its best start, then from the next best, then from the best
    found with a few random changes, for as long as the work lasts. Large problems end with the
    first, small ones get them all.
    """
    work = Work()
    found = []
    layers_L = np.arange(len(problem.load_LNE))

    def search(row_L: Ints, expert_of_slot_LP: Ints) -> None:
        part = problem.rows(row_L)
        if num_expert_groups is not None:
            part = replace(
                part,
                allowed_LNE=_allowed_nodes(
                    expert_of_slot_LP, num_expert_groups, *part.load_LNE.shape[1:]
                ),
            )
        found.extend(np.split(improve(part, expert_of_slot_LP, work), len(row_L) // len(layers_L)))

    for start_L in np.argsort(
        [problem.value(expert_of_slot_LP) for expert_of_slot_LP in starts_ILP],
        axis=0,
        kind="stable",
    ):
        if work.left > 0:
            search(layers_L, starts_ILP[start_L, layers_L])
    generator = np.random.default_rng(0)
    for _ in range(KICK_ROUNDS if num_expert_groups is None else 0):
        if work.left > 0:
            best_LP = np.tile(best_of(problem, found), (KICKS, 1))
            search(np.tile(layers_L, KICKS), kick(best_LP, problem.load_LNE.shape[2], generator))
    return found


def _keeps_groups(
    expert_of_slot_LP: Ints, num_expert_groups: int, num_nodes: int, num_experts: int
) -> bool:
    """Whether every group is within one node in every layer."""
    return bool(
        (
            _allowed_nodes(expert_of_slot_LP, num_expert_groups, num_nodes, num_experts).sum(axis=1)
            == 1
        ).all()
    )


def best_of(problem: Problem, placements: Sequence[Ints]) -> Ints:
    """Layer by layer the first placement that is best by the objective, up to rounding."""
    candidates_ILP = np.stack(placements)
    seconds_IL = np.stack(
        [problem.evaluate(expert_of_slot_LP).seconds_L for expert_of_slot_LP in candidates_ILP]
    )
    first_L = (seconds_IL <= seconds_IL.min(axis=0) * (1 + 1e-9)).argmax(axis=0)
    return candidates_ILP[first_L, np.arange(len(first_L))]


def _allowed_nodes(
    expert_of_slot_LP: Ints, num_expert_groups: int, num_nodes: int, num_experts: int
) -> Bools:
    """The nodes that hold something of an expert's group, bool [L, N, E]."""
    held_LNE = holdings(expert_of_slot_LP, num_nodes, num_experts)
    return np.repeat(
        held_LNE.reshape(*held_LNE.shape[:2], num_expert_groups, -1).any(axis=3),
        num_experts // num_expert_groups,
        axis=2,
    )
