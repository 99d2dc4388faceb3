"""Experts change ranks at a step boundary, with their optimizer state: who computes them changes, never what is computed.

Letters: L MoE layers, E experts and as many slots of an expert-parallel group, R its ranks, G = E / R slots of a rank,
K rows of the trace, N nodes of the job, M nodes of a group.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from pangu_locmoe.config import Config
from pangu_locmoe.errors import DataError
from pangu_locmoe.load.forecast import mean_share
from pangu_locmoe.load.placement import Costs, Plan, load_plan, place_trace
from pangu_locmoe.load.state import states
from pangu_locmoe.load.trace import Trace
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.topology import Topology

VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def starting_slots(config: Config) -> np.ndarray:
    """The placement that `placement.start` asks for: an expert for each slot, int [L, E].

    Raises:
        DataError: it is a file, but no plan, or one for other layers, experts or ranks.
    """
    start, model, moe = config.placement.start, config.model, config.moe
    if isinstance(start, list):
        return np.asarray(start)
    assert start is not None
    try:
        plan = load_plan(Path(start))
    except DataError as error:
        raise DataError(f"placement.start = {start!r}: {error}") from None
    has = (*plan.slots_LS.shape, plan.nodes * plan.ranks_per_node)
    needs = (model.num_moe_layers, moe.num_experts, config.parallel.expert_parallel)
    if has != needs:
        (layers, slots, ranks), (own_layers, own_slots, own_ranks) = has, needs
        raise DataError(
            f"placement.start = {start!r}: the plan has {layers} layers of {slots} slots on {ranks} ranks, the run {own_layers} of {own_slots} on {own_ranks}"
        )
    return plan.slots_LS


def plan_placement(config: Config, topology: Topology, trace: Trace, step: int, now_LE: np.ndarray) -> Plan:
    """The plan after `step` for the steps up to the next one, from the trace so far.

    A layer keeps its placement while its load is transient (unless placement.while_transient), and where less than placement.min_gain would be saved.

    Args:
        config: the run; its placement section has the cluster's speeds.
        topology: expert-parallel groups are alike: all have the same plan, made for the mean of their loads.
        trace: rows up to `step`, with their sources.
        step: the last one made.
        now_LE: an expert for each slot now.
    """
    wishes, model = config.placement, config.model
    nodes = max(1, topology.expert_parallel // topology.places_per_node)
    costs = Costs.of_model(
        model.hidden_size, model.ffn_size, wishes.flops_per_second, wishes.link_bytes_per_second, wishes.every, VALUE_BYTES[config.train.precision]
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
        current=now_LE,
        stable_from=None if wishes.while_transient else lambda past: states(past).layers_stable_from,
        min_gain=wishes.min_gain,
    )


def _of_a_group(trace: Trace, topology: Topology, nodes: int) -> Trace:
    """Tokens by node of an expert-parallel group, all groups together: node n of the job is node n mod M of its group."""
    assert trace.source_KLNE is not None
    rows, layers, job_nodes, experts = trace.source_KLNE.shape
    groups = topology.num_places // topology.expert_parallel
    source_KLME = trace.source_KLNE.reshape(rows, layers, job_nodes // nodes, nodes, experts).sum(axis=2) // groups
    return replace(trace, load_KLE=source_KLME.sum(axis=2), source_KLNE=source_KLME)


def agree(plan: Optional[Plan], now_LE: np.ndarray, communicator: Communicator) -> np.ndarray:
    """The placement of rank 0's plan, on all ranks; the others have no plan, because the trace is rank 0's."""
    own = now_LE if plan is None else plan.slots_LS
    shared = communicator.all_gather(Tensor(own.reshape(-1).astype(np.int32), mstype.int32)).asnumpy()
    first: np.ndarray = shared.reshape(communicator.size, *now_LE.shape)[0].astype(np.int64)
    return first


def event(step: int, plan: Plan, started: float) -> Dict[str, Any]:
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


def slot_to_expert(model: PanguSigma) -> np.ndarray:
    """Which expert is in each slot of an expert-parallel group, int [L, E]."""
    return np.stack([layer.expert_of_slot_E for layer in model.moe_layers.values()])


def move_experts(model: PanguSigma, optimizer: nn.Cell, exchange: Exchange, wanted_LE: np.ndarray) -> None:
    """Bring every expert and its moments to the slot where `wanted_LE` has it; all ranks call this with the same.

    Args:
        model: this rank's part.
        optimizer: its AdamW.
        exchange: the way to the ranks that share the experts; its ledger counts what moves.
        wanted_LE: an expert for each slot, int [L, E], each row a permutation.
    """
    state = {parameter.name: parameter for parameter in optimizer.get_parameters()}
    for layer, wanted_E in zip(model.moe_layers.values(), wanted_LE):
        if np.array_equal(wanted_E, layer.expert_of_slot_E):
            continue
        leaving_G, matrix_RR, arriving_G = _route(layer.expert_of_slot_E, wanted_E, len(exchange.ranks), exchange.place)
        for weight in (layer.experts.w_in, layer.experts.w_out):
            for parameter in (weight, state[f"adam_m.{weight.name}"], state[f"adam_v.{weight.name}"]):
                rows_GX = ops.gather(ops.reshape(parameter, (parameter.shape[0], -1)), Tensor(leaving_G), 0)
                rows_GX = ops.gather(exchange.move_own(rows_GX, matrix_RR), Tensor(arriving_G), 0)
                ops.assign(parameter, ops.reshape(rows_GX, parameter.shape))
        layer.place(wanted_E)


def _route(now_E: np.ndarray, wanted_E: np.ndarray, num_ranks: int, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order in which this rank's experts leave, who sends how many to whom, and where those that arrive belong.

    Returns:
        leaving_G: places of this rank's experts, sorted by destination; int32.
        matrix_RR: experts from each rank to each, int64.
        arriving_G: for each of this rank's places, which of the arrivals (sorted by source) takes it; int32.
    """
    own = len(now_E) // num_ranks
    target_E = np.argsort(wanted_E)[now_E] // own  # where the expert in each slot goes
    source_E = np.arange(len(now_E)) // own
    matrix_RR = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    np.add.at(matrix_RR, (source_E, target_E), 1)
    leaving_G = np.argsort(target_E[place * own : (place + 1) * own], kind="stable")
    arrivals_G = now_E[target_E == place]  # by source, and in the source's order
    arriving_G = np.argsort(arrivals_G)[np.searchsorted(np.sort(arrivals_G), wanted_E[place * own : (place + 1) * own])]
    return leaving_G.astype(np.int32), matrix_RR, arriving_G.astype(np.int32)
