"""Experts follow their tokens (`placement` in the YAML), by plans made from the load trace.

Letters: L MoE layers, E experts, P as many slots of an expert-parallel group, W rows of the trace,
N nodes of the job (merged_WLNE: of a group).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype

from pangu_locmoe.config import Config
from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.forecast import mean_share
from pangu_locmoe.expert_load.placement import Costs, PlacementPlan, load_placement, place_trace
from pangu_locmoe.expert_load.placement.plan import FILE_KEY
from pangu_locmoe.expert_load.state import states
from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.metrics import Row
from pangu_locmoe.train.step import Stepper, StepResult

VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Placement:
    """Experts begin where placement.start has them, and move as the plans of placement.policy say.

    Args:
        config: the run.
        stepper: whose experts move; a rank's of a job.
        trace: the load trace so far; rank 0 asks for it.
    """

    def __init__(self, config: Config, stepper: Stepper, trace: Callable[[], Trace]) -> None:
        self._config = config
        self._stepper = stepper
        self._trace = trace
        if config.placement.start is not None:
            stepper.move_experts(starting_expert_of_slot(config))

    @staticmethod
    def wanted(config: Config, stepper: Stepper) -> bool:
        """Whether experts of the run can be elsewhere than in order."""
        placed = config.placement.policy != "off" or config.placement.start is not None
        return placed and stepper.world.exchange is not None

    def __call__(self, step: int, result: StepResult) -> Iterator[Row]:
        config = self._config
        planned = config.placement.policy != "off" and step % config.placement.every == 0
        if planned and step < config.train.steps:
            yield from self._place_experts(step)

    def state(self) -> Dict[str, Any]:
        return {FILE_KEY: self._expert_of_slot_LP.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        expert_of_slot = state.get(FILE_KEY, state.get("expert_of_slot"))
        if expert_of_slot is None:
            return
        # Weights stay: the checkpoint's are read to where its experts were.
        for layer, slots in zip(self._stepper.model.moe_layers.values(), expert_of_slot):
            layer.transport.set_placement(np.asarray(slots))

    @property
    def _expert_of_slot_LP(self) -> np.ndarray:
        expert_of_slot_LP = self._stepper.expert_of_slot_LP
        assert expert_of_slot_LP is not None
        return expert_of_slot_LP

    def _place_experts(self, step: int) -> Iterator[Row]:
        """Plan from the trace, and move what the plan moves."""
        started = time.perf_counter()
        expert_of_slot_LP = self._expert_of_slot_LP
        world = self._stepper.world
        plan = None
        if world.is_first:
            plan = plan_placement(
                self._config, world.topology, self._trace(), step, expert_of_slot_LP
            )
        self._stepper.move_experts(agree(plan, expert_of_slot_LP, world.communicator))
        if plan is not None:
            yield event(step, plan, started)


def starting_expert_of_slot(config: Config) -> np.ndarray:
    """The placement that `placement.start` asks for: an expert for each slot, int [L, P].

    Raises:
        DataError: it is a file, but no plan, or one for other layers, experts or ranks.
    """
    start = config.placement.start
    model = config.model
    moe = config.moe
    if isinstance(start, list):
        return np.asarray(start)
    assert start is not None
    try:
        placement = load_placement(Path(start))
    except DataError as error:
        raise DataError(f"placement.start = {start!r}: {error}") from None
    needs = (model.num_moe_layers, moe.num_experts, config.parallel.expert_parallel)
    ranks = needs[2] if placement.num_ranks is None else placement.num_ranks
    has = (*placement.expert_of_slot_LP.shape, ranks)
    own_layers, own_slots, own_ranks = needs
    if has != needs:
        layers, slots, ranks = has
        raise DataError(
            f"placement.start = {start!r}: the plan has {layers} layers of {slots} slots "
            f"on {ranks} ranks, the run {own_layers} of {own_slots} on {own_ranks}"
        )
    experts = int(placement.expert_of_slot_LP.max()) + 1
    if experts != moe.num_experts:  # as many slots, some of them for copies
        raise DataError(
            f"placement.start = {start!r}: the plan has {experts} experts in "
            f"{own_slots} slots, the run {moe.num_experts} experts"
        )
    return placement.expert_of_slot_LP


def plan_placement(
    config: Config, topology: Topology, trace: Trace, step: int, expert_of_slot_LP: np.ndarray
) -> PlacementPlan:
    """The plan after `step` for the steps up to the next one, from the trace so far.

    A layer keeps its placement while its load is transient, as it counts at the beginning of a run,
    while there are too few rows to tell (unless placement.while_transient), and where less than
    placement.min_gain would be saved.

    Args:
        config: the run; its placement section has the cluster's speeds.
        topology: expert-parallel groups are alike: all have the same plan, made for the mean of
            their loads.
        trace: rows up to `step`, with their sources.
        step: the last one made.
        expert_of_slot_LP: an expert for each slot now.
    """
    wishes = config.placement
    model = config.model
    nodes = max(1, topology.expert_parallel // topology.replicas_per_node)
    costs = Costs.of_model(
        model.hidden_size,
        model.ffn_size,
        wishes.flops_per_second,
        wishes.link_bytes_per_second,
        wishes.every,
        VALUE_BYTES[config.train.precision],
    )
    return place_trace(
        _of_a_group(trace, topology, nodes),
        nodes,
        topology.expert_parallel // nodes,
        costs,
        mean_share,
        wishes.policy,
        origin=step + 1,
        horizon=wishes.every,
        current=expert_of_slot_LP,
        stable_from=None
        if wishes.while_transient
        else lambda past: states(past).layers_stable_from,
        min_gain=wishes.min_gain,
    )


def _of_a_group(trace: Trace, topology: Topology, nodes: int) -> Trace:
    """Tokens by node of an expert-parallel group, all groups together: node n of the job is node n
    mod `nodes` of its group.
    """
    assert trace.source_WLNE is not None
    rows, layers, job_nodes, experts = trace.source_WLNE.shape
    groups = topology.num_replicas // topology.expert_parallel
    merged_WLNE = (
        trace.source_WLNE.reshape(rows, layers, job_nodes // nodes, nodes, experts).sum(axis=2)
        // groups
    )
    return replace(trace, load_WLE=merged_WLNE.sum(axis=2), source_WLNE=merged_WLNE)


def agree(
    plan: Optional[PlacementPlan], expert_of_slot_LP: np.ndarray, communicator: Communicator
) -> np.ndarray:
    """The placement of rank 0's plan, on all ranks; the others have no plan, because the trace
    is rank 0's.
    """
    own = expert_of_slot_LP if plan is None else plan.expert_of_slot_LP
    shared = communicator.all_gather(
        Tensor(own.reshape(-1).astype(np.int32), mstype.int32)
    ).asnumpy()
    first: np.ndarray = shared.reshape(communicator.size, *expert_of_slot_LP.shape)[0].astype(
        np.int64
    )
    return first


def event(step: int, plan: PlacementPlan, started: float) -> Dict[str, Any]:
    """A row for metrics.jsonl; `started` is when planning began."""
    return {
        "step": step,
        "event": "placement",
        "policy": plan.policy,
        "layers_stable": sum(state == "stable" for state in plan.state),
        "experts_moved": plan.experts_moved,
        "bytes_moved": plan.bytes_moved,
        "gain": plan.gain,
        "max_over_mean_now": plan.now.max_over_mean,
        "max_over_mean_after": plan.after.max_over_mean,
        "inter_node_bytes_now": plan.now.inter_node_bytes,
        "inter_node_bytes_after": plan.after.inter_node_bytes,
        "seconds": time.perf_counter() - started,
    }
