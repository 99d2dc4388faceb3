"""The plan: where every copy of every expert goes, what that is expected to bring, and the file it
is kept in.

Letters: L layers, N nodes, R ranks, E experts, P slots.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.placement.costs import (
    CROSSINGS,
    Costs,
    Evaluation,
    Ints,
    evaluate,
    holdings,
)
from pangu_locmoe.expert_load.placement.eplb import rebalance
from pangu_locmoe.expert_load.placement.locality import place_by_locality
from pangu_locmoe.expert_load.placement.spread import spread_copies
from pangu_locmoe.expert_load.placement.starts import extend
from pangu_locmoe.expert_load.state import STABLE, TRANSIENT
from pangu_locmoe.files import json_text, write_atomic

POLICIES = ("eplb", "locality")

FILE_KEY = "slot_to_expert"
"""`expert_of_slot` in plan files and in the state of checkpoints, whatever version wrote them."""


@dataclass(frozen=True)
class Figures:
    """What a placement does to a load.

    Attributes:
        max_over_mean: load of the fullest rank over the mean rank's, mean over the layers.
        inter_node_bytes: token rows over all node links in a step, all layers, 4 crossings.
        step_seconds: modelled, all layers, with the moves that lead there.
    """

    max_over_mean: float
    inter_node_bytes: float
    step_seconds: float

    @classmethod
    def of(cls, result: Evaluation, costs: Costs) -> Figures:
        rows = float(result.out_LN.sum())
        return cls(
            float(result.max_over_mean_L.mean()),
            rows * CROSSINGS * costs.row_bytes,
            float(result.seconds_L.sum()),
        )


@dataclass(frozen=True)
class PlacementPlan:
    """A placement with its figures.

    Attributes:
        expert_of_slot: [layers][slots]; rank r holds the r-th contiguous block of slots; an expert
            may have several.
        experts, nodes, ranks_per_node: sizes; ranks are numbered node by node.
        policy, groups: how it was made; groups None: no limit.
        now, after: on the load the plan was made for (the forecast), of the placement there was and
            of this one.
        experts_moved: experts that ranks have to fetch, all layers; a rank that fetches two counts
            two.
        bytes_moved: weights and optimizer state of these.
        move_seconds: sending them over one link, spread over the horizon, per step; part of
            after.step_seconds.
        costs: the prices used.
        state: of each layer, "stable", "transient" or "unknown"; a transient layer keeps its
            placement, one of which too few rows are known is placed by those.
        capacity_factor: of each transient layer, what would have held nearly all loads of late;
            None for others.
        origin, horizon: first step the plan is for, and how many; None: not from a trace.
        actual_now, actual_after, actual_oracle: on the recorded loads of the horizon, where the
            trace has them; the oracle is the same policy given those loads instead of the forecast.
        notes: what was assumed.
    """

    expert_of_slot: List[List[int]]
    experts: int
    nodes: int
    ranks_per_node: int
    policy: str
    groups: Optional[int]
    now: Figures
    after: Figures
    experts_moved: int
    bytes_moved: float
    move_seconds: float
    costs: Costs
    state: List[str]
    capacity_factor: List[Optional[float]]
    origin: Optional[int] = None
    horizon: Optional[int] = None
    actual_now: Optional[Figures] = None
    actual_after: Optional[Figures] = None
    actual_oracle: Optional[Figures] = None
    notes: List[str] = field(default_factory=list)

    @property
    def expert_of_slot_LP(self) -> Ints:
        return np.asarray(self.expert_of_slot, dtype=np.int64)

    @property
    def gain(self) -> float:
        """Part of the step's seconds that is saved, moves paid; negative: lost."""
        return 1 - self.after.step_seconds / self.now.step_seconds if self.now.step_seconds else 0.0

    def to_dict(self) -> Dict[str, Any]:
        """What JSON can hold; `read_plan` takes it back."""
        values = asdict(self)
        return {FILE_KEY: values.pop("expert_of_slot"), **values}

    def format(self) -> str:
        """A few lines to read."""
        slots = len(self.expert_of_slot[0])
        span = (
            f", steps {self.origin} to {self.origin + self.horizon - 1}"
            if self.origin is not None and self.horizon
            else ""
        )
        lines = [
            (
                f"{self.policy}: {len(self.expert_of_slot)} layers, {self.experts} experts in "
                f"{slots} slots on {self.nodes} x {self.ranks_per_node} ranks{span}"
            ),
            f"{'':22}{'max/mean':>9}{'MB between nodes':>18}{'ms a step':>11}",
        ]
        rows = (
            ("forecast, now", self.now),
            ("forecast, after", self.after),
            ("recorded, now", self.actual_now),
        )
        for name, figures in (
            *rows,
            ("recorded, after", self.actual_after),
            ("recorded, oracle", self.actual_oracle),
        ):
            if figures:
                lines.append(
                    f"{name:22}{figures.max_over_mean:9.3f}{figures.inter_node_bytes / 1e6:18.3f}{figures.step_seconds * 1e3:11.4f}"
                )
        lines.append(
            f"moves {self.experts_moved} experts, {self.bytes_moved / 1e6:.1f} MB "
            f"({self.move_seconds * 1e3:.4f} ms of each step); the modelled step changes "
            f"by {0.0 - self.gain:+.1%}"
        )
        for layer, factor in enumerate(self.capacity_factor):
            if self.state[layer] == TRANSIENT:
                lines.append(
                    f"layer {layer} is transient: it keeps its placement; capacity factor "
                    f"{factor:.2f} gives its experts room"
                )
        return "\n".join([*lines, *self.notes])


def plan(
    load_LNE: NDArray[Any],
    ranks_per_node: int,
    current_LP: Ints,
    costs: Costs,
    policy: str = "locality",
    num_slots: Optional[int] = None,
    num_expert_groups: Optional[int] = None,
    min_gain: Optional[float] = None,
    capacity_factor: Optional[Sequence[Optional[float]]] = None,
    starts: Sequence[Ints] = (),
    one_copy_per_rank: bool = False,
) -> PlacementPlan:
    """Plan from an expected load: what `place_trace` and a training run call.

    Args:
        load_LNE: expected token rows of a step by source node and expert.
        ranks_per_node: R / N.
        current_LP: the placement there is, int [L, P], at most num_slots.
        costs: prices.
        policy: eplb or locality.
        num_slots: P of a layer; None: as many as now.
        num_expert_groups: locality: each group stays within a node; eplb: hierarchical if a
            multiple of N; None: no groups.
        min_gain: a layer keeps its placement unless its modelled seconds, moves paid, fall by more
            than this part of them. None: EPLB's plan is taken as it is, ours where it gains
            anything.
        capacity_factor: of each layer that is transient, else None; a transient layer keeps its
            placement.
        starts: further placements for locality to start from.
        one_copy_per_rank: no rank holds an expert twice; where the policy would have that, copies
            are exchanged at last.

    Raises:
        DataError: an unknown policy, sizes that do not fit.
    """
    load_LNE = np.asarray(load_LNE, dtype=np.float64)
    num_layers, num_nodes, num_experts = load_LNE.shape
    num_ranks, num_slots = num_nodes * ranks_per_node, num_slots or current_LP.shape[1]
    if policy == "locality":
        expert_of_slot_LP = place_by_locality(
            load_LNE, num_ranks, current_LP, costs, num_slots, num_expert_groups, starts
        )
    elif policy == "eplb":
        expert_of_slot_LP = rebalance(
            load_LNE.sum(axis=1), num_slots, num_expert_groups or 1, num_nodes, num_ranks
        )[0]
    else:
        raise DataError(f"unknown policy {policy!r}: {' or '.join(POLICIES)}")
    held_LRE = holdings(current_LP, num_ranks, num_experts)
    now = evaluate(current_LP, load_LNE, num_ranks, costs)
    factors: List[Optional[float]] = (
        [None] * num_layers if capacity_factor is None else list(capacity_factor)
    )
    keeps_L = np.array([factor is not None for factor in factors])
    if min_gain is not None:
        after = evaluate(expert_of_slot_LP, load_LNE, num_ranks, costs, held_LRE)
        keeps_L |= now.seconds_L - after.seconds_L <= min_gain * now.seconds_L
    if keeps_L.any():
        expert_of_slot_LP = np.where(
            keeps_L[:, None],
            extend(current_LP, load_LNE.sum(axis=1), num_ranks, num_slots),
            expert_of_slot_LP,
        )
    if one_copy_per_rank:
        expert_of_slot_LP = spread_copies(
            expert_of_slot_LP, load_LNE.sum(axis=1), num_ranks, num_nodes
        )
    after = evaluate(expert_of_slot_LP, load_LNE, num_ranks, costs, held_LRE)
    moved = int(after.moved_L.sum())
    return PlacementPlan(
        expert_of_slot=expert_of_slot_LP.tolist(),
        experts=num_experts,
        nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        policy=policy,
        groups=num_expert_groups,
        now=Figures.of(now, costs),
        after=Figures.of(after, costs),
        experts_moved=moved,
        bytes_moved=moved * costs.expert_bytes,
        move_seconds=moved * costs.move_seconds,
        costs=costs,
        state=[STABLE if factor is None else TRANSIENT for factor in factors],
        capacity_factor=factors,
    )


def save_plan(plan: PlacementPlan, path: Path) -> None:
    """Write the plan as JSON, whole or not at all. Raises DataError."""
    try:
        write_atomic(path, (json_text(plan.to_dict()) + "\n").encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
