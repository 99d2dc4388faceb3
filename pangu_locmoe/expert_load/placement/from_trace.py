"""From a recorded trace to a plan.

The load of the horizon is expected to be, for each layer, its recent tokens per step, times the
forecast share of each expert, times the recent split of that expert's tokens over the nodes. The
split is not forecast by itself: shares are what the forecasters were compared on; the counts of one
node and one expert are N times fewer and noisier; and the split changes with which node reads what,
which is fixed during a run.

Letters: W rows, L layers, N nodes, R ranks, E experts, P slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, List, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.forecast import mean_share
from pangu_locmoe.expert_load.placement.costs import Costs, Floats, Ints, evaluate, holdings
from pangu_locmoe.expert_load.placement.eplb import check_sizes
from pangu_locmoe.expert_load.placement.plan import Figures, PlacementPlan, plan
from pangu_locmoe.expert_load.state import UNKNOWN
from pangu_locmoe.expert_load.trace import Trace

# rows before the origin that give the tokens per step, the split over the nodes and the spare
# capacity
RECENT = 100
COVERED = 0.99  # of a transient layer's recent expert loads should fit into its capacity

Forecaster = Callable[[Trace, int, int], NDArray[Any]]
StableFrom = Callable[[Trace], Optional[Sequence[Optional[int]]]]


def place_trace(
    trace: Trace,
    nodes: int,
    ranks_per_node: int,
    costs: Costs,
    forecast_share: Forecaster = mean_share,
    policy: str = "locality",
    groups: Optional[int] = None,
    copies: int = 0,
    origin: Optional[int] = None,
    horizon: int = 1000,
    current: Optional[Ints] = None,
    stable_from: Optional[StableFrom] = None,
    min_gain: Optional[float] = None,
    one_copy_per_rank: bool = False,
) -> PlacementPlan:
    """Plan for the steps from the origin on, from the rows before it.

    Args:
        trace: loads; `locality` needs its source counts.
        nodes, ranks_per_node: of the cluster. A trace of more nodes is merged if they divide
            evenly.
        costs: prices; their horizon is replaced by `horizon`.
        forecast_share: (trace of the past, origin, horizon) -> expected mean share of each expert,
            [L, E]; `auto`'s forecast.
        policy, groups, min_gain, one_copy_per_rank: as in `plan`.
        copies: spare slots of each layer over all ranks.
        origin: first step of the horizon; None: the step after the trace.
        horizon: steps.
        current: expert_of_slot now, [L, P]; None: as training starts, rank r has the r-th
            contiguous block of experts.
        stable_from: (trace of the past) -> each layer's first step of the stable state or None, or
            None altogether where the past is too short to tell: then layers are placed by what
            there is. None: all layers count as stable. A transient layer keeps its placement;
            instead it is told the capacity factor (capacity over the mean
            load of an expert) that would have held 99% of the loads of its experts in the last 100
            rows.

    Raises:
        DataError: no row before the origin; no source counts where they are needed; sizes that do
            not fit.
    """
    if horizon < 1:
        raise DataError(f"horizon ({horizon}) must be at least 1 step")
    if not len(trace.step_W):
        raise DataError("the trace has no rows")
    origin = int(trace.step_W[-1]) + 1 if origin is None else origin
    past = trace.between(int(trace.step_W[0]), origin)
    future = trace.between(origin, origin + horizon)
    if not len(past.step_W):
        raise DataError(
            f"origin {origin}: the trace has no rows before it; it starts at step {trace.step_W[0]}"
        )
    num_layers, num_experts = trace.load_WLE.shape[1:]
    num_slots = num_experts + copies
    num_ranks = nodes * ranks_per_node
    if copies < 0:
        raise DataError(f"copies ({copies}) must not be negative")
    check_sizes(num_experts, num_slots, groups or 1, nodes, num_ranks)
    source_WLNE, notes = _sources(trace, nodes, policy)
    rows = len(past.step_W)
    recent_WLNE = source_WLNE[max(0, rows - RECENT) : rows]
    load_LNE = expected_load(recent_WLNE, forecast_share(past, origin, horizon))
    current = (
        first_placement(num_layers, num_experts, num_slots, num_ranks)
        if current is None
        else np.asarray(current)
    )
    check_current(current, num_layers, num_experts, num_slots, num_ranks)
    costs = replace(costs, horizon=horizon)
    factors = None
    found = None if stable_from is None else stable_from(past)
    if stable_from is None:
        notes.append("the state was not examined: every layer counts as stable")
    elif found is None:
        notes.append(
            f"too short to tell: placed by the {rows} row{'' if rows == 1 else 's'} there "
            f"{'is' if rows == 1 else 'are'}; nothing is known of the load's stability"
        )
    else:
        spare = spare_capacity(past.load_WLE[-RECENT:])
        factors = [
            None if step is not None and step <= origin else factor
            for step, factor in zip(found, spare)
        ]
    result = plan(
        load_LNE,
        ranks_per_node,
        current,
        costs,
        policy,
        num_slots,
        groups,
        min_gain,
        factors,
        one_copy_per_rank=one_copy_per_rank,
    )
    result = replace(result, origin=origin, horizon=horizon, notes=notes)
    if stable_from is not None and found is None:
        result = replace(result, state=[UNKNOWN] * num_layers)
    if not len(future.step_W):
        return result
    if future.step_W[-1] + trace.stride < origin + horizon:
        notes.append(
            f"recorded figures: the trace ends at step {future.step_W[-1]}, before the horizon does"
        )
    actual_LNE = source_WLNE[rows : rows + len(future.step_W)].mean(axis=0)
    oracle = plan(
        actual_LNE,
        ranks_per_node,
        current,
        costs,
        policy,
        num_slots,
        groups,
        min_gain,
        factors,
        starts=(result.expert_of_slot_LP,),
        one_copy_per_rank=one_copy_per_rank,
    )
    return _with_recorded(result, current, oracle, actual_LNE)


def _with_recorded(
    result: PlacementPlan, current: Ints, oracle: PlacementPlan, actual_LNE: Floats
) -> PlacementPlan:
    """The plan with what the placement there was, its own and the oracle's do to the loads that
    came.
    """
    num_ranks = result.nodes * result.ranks_per_node
    held_LRE = holdings(current, num_ranks, result.experts)
    now, after, best = (
        Figures.of(
            evaluate(expert_of_slot_LP, actual_LNE, num_ranks, result.costs, held_LRE), result.costs
        )
        for expert_of_slot_LP in (current, result.expert_of_slot_LP, oracle.expert_of_slot_LP)
    )
    return replace(result, actual_now=now, actual_after=after, actual_oracle=best)


def expected_load(recent_WLNE: NDArray[Any], share_LE: NDArray[Any]) -> Floats:
    """Token rows of a step by source node and expert, [L, N, E]: recent tokens per step * share *
    recent split over nodes.

    The split of an expert that nobody used of late is that of all the layer's tokens.
    """
    share_LE = np.asarray(share_LE, dtype=np.float64)
    mean_LNE = recent_WLNE.mean(axis=0)
    if share_LE.shape != mean_LNE[:, 0].shape or not (
        np.isfinite(share_LE).all() and (share_LE >= 0).all()
    ):
        raise DataError(
            f"the forecast must be shares [{len(mean_LNE)} layers, {mean_LNE.shape[2]} "
            "experts], none negative"
        )
    total_L = mean_LNE.sum(axis=(1, 2))
    node_LN1 = mean_LNE.sum(axis=2, keepdims=True) / np.maximum(total_L, 1e-300)[:, None, None]
    used_L1E = mean_LNE.sum(axis=1, keepdims=True)
    split_LNE = np.divide(
        mean_LNE, used_L1E, out=np.broadcast_to(node_LN1, mean_LNE.shape).copy(), where=used_L1E > 0
    )
    return total_L[:, None, None] * share_LE[:, None] * split_LNE


def spare_capacity(load_WLE: NDArray[Any]) -> List[float]:
    """Per layer the capacity, as a multiple of the mean load of an expert in the same row, that
    holds 99% of the loads.
    """
    mean_WL1 = np.maximum(load_WLE.mean(axis=2, keepdims=True), 1e-300)
    return [
        float(np.quantile(load_WLE[:, layer] / mean_WL1[:, layer], COVERED))
        for layer in range(load_WLE.shape[1])
    ]


def first_placement(num_layers: int, num_experts: int, num_slots: int, num_ranks: int) -> Ints:
    """As training starts: contiguous blocks, int64 [L, E]; if ranks do not divide the experts,
    spread over the P slots.
    """
    expert_of_slot_P = (
        np.arange(num_experts)
        if num_experts % num_ranks == 0
        else np.arange(num_slots) * num_experts // num_slots
    )
    return np.tile(expert_of_slot_P.astype(np.int64), (num_layers, 1))


def check_current(
    current_LP: NDArray[Any], num_layers: int, num_experts: int, num_slots: int, num_ranks: int
) -> None:
    """Raises DataError if the current placement is not one of these layers and experts that fits
    into the slots.
    """
    if current_LP.ndim != 2 or len(current_LP) != num_layers:
        raise DataError(f"the current placement must have {num_layers} layers, as the trace has")
    if current_LP.shape[1] % num_ranks or current_LP.shape[1] > num_slots:
        raise DataError(
            f"the current placement has {current_LP.shape[1]} slots; {num_ranks} ranks "
            f"must divide them, and at most {num_slots} are planned"
        )
    for layer, expert_of_slot_P in enumerate(current_LP):
        if set(expert_of_slot_P.tolist()) != set(range(num_experts)):
            raise DataError(
                f"the current placement of layer {layer} must hold the experts 0 to "
                f"{num_experts - 1}, each at least once"
            )


def _sources(trace: Trace, nodes: int, policy: str) -> Tuple[NDArray[Any], List[str]]:
    """Token rows by source node, [W, L, N, E], and what had to be assumed."""
    recorded = None if trace.source_WLNE is None else trace.source_WLNE.shape[2]
    if trace.source_WLNE is not None and recorded is not None and recorded % nodes == 0:
        num_rows, num_layers, _, num_experts = trace.source_WLNE.shape
        merged_WLNE = trace.source_WLNE.reshape(
            num_rows, num_layers, nodes, recorded // nodes, num_experts
        ).sum(axis=3)
        return merged_WLNE, [] if recorded == nodes else [
            f"the trace's {recorded} nodes are merged into {nodes}"
        ]
    lacks = (
        "does not say which node tokens come from"
        if recorded is None
        else f"has {recorded} nodes, which do not merge evenly into {nodes}"
    )
    if policy == "locality":
        raise DataError(f"the trace {lacks}: the locality policy needs that; eplb does not")
    even_WLNE = np.repeat(trace.load_WLE[:, :, None] / nodes, nodes, axis=2)
    return even_WLNE, [f"the trace {lacks}: every node is taken to send the same"]
