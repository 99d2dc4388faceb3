"""`pangu-locmoe simulate`: step times of a configuration on clusters that are not there.

The equations are in cost.py.
"""

from __future__ import annotations

import difflib
import math
from typing import List, Optional, Sequence, Tuple

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import ROUTER_TRAITS, RouterTraits
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.simulate.cost import CROSSINGS, Work, step_time
from pangu_locmoe.simulate.devices import Device
from pangu_locmoe.simulate.layout import Floats, Layout, traffic
from pangu_locmoe.simulate.result import Assumptions, Row, Simulation
from pangu_locmoe.simulate.routing import assumed_shares, trace_shares
from pangu_locmoe.simulate.rows import rows_of

ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

__all__ = ["Assumptions", "Row", "Simulation", "layout_of", "simulate", "work_of"]


def simulate(
    config: Config,
    nodes: Sequence[int],
    routers: Sequence[str],
    device: Device,
    load: Optional[Trace] = None,
    load_router: Optional[str] = None,
    assumptions: Optional[Assumptions] = None,
) -> Simulation:
    """Step times for every number of nodes and every router.

    Args:
        config: model, batch, capacity and parallel settings.
        nodes: sizes of the cluster.
        routers: names; each needs a routing in `assumptions`, or the trace.
        device: processor and links.
        load: routing of one router, in place of what is assumed.
        load_router: whose it is; None: the only one named, or moe.router.
        assumptions: None: the defaults.

    Raises:
        ConfigError: no nodes, no routers, a router without a routing or with several experts for a
            token, or one that the trace cannot be given to.
        TopologyError: ranks, experts and groups do not divide each other.
        DataError: the trace cannot be used.
    """
    assumed = assumptions or Assumptions()
    traced = _traced(config, nodes, routers, load, load_router, assumed)
    rows = []
    for count in nodes:
        layout = layout_of(config, count, device, assumed)
        for router in routers:
            if load is not None and router == traced:
                share_INE, routed = trace_shares(load, layout)
            else:
                share_INE = assumed_shares(layout, assumed.routing[router])
                routed = "assumed"
            rows.append(_row(config, layout, device, assumed, router, share_INE, routed))
    return Simulation(rows, device, assumed, _notes(config, rows, device, assumed))


def _traced(
    config: Config,
    nodes: Sequence[int],
    routers: Sequence[str],
    load: Optional[Trace],
    load_router: Optional[str],
    assumed: Assumptions,
) -> Optional[str]:
    """Whose routing the trace is."""
    if not nodes or not routers:
        raise ConfigError("nodes and routers: name at least one of each")
    for count in nodes:
        if count < 1:
            raise ConfigError(f"nodes = {count}: must be at least 1")
    traced = None
    if load is not None:
        traced = load_router or (routers[0] if len(routers) == 1 else config.moe.router)
        if traced not in routers:
            raise ConfigError(
                f"the load trace is of router {traced!r} (moe.router), which is not among "
                f"{', '.join(routers)}: name it"
            )
    for router in routers:
        if config.moe.top_k > 1 and ROUTER_TRAITS.get(router, RouterTraits()).has_top_k:
            raise ConfigError(
                f"moe.top_k = {config.moe.top_k}: the model of a step has one expert for each "
                "token: must be 1"
            )
        if router == "locmoe_plus":  # by name: routers need MindSpore, and this does not
            raise ConfigError(
                f"router = {router!r}: a token may have several of its experts, and the "
                "model of a step has one for each"
            )
        if router != traced and router not in assumed.routing:
            nearest = difflib.get_close_matches(router, assumed.routing, n=1)
            raise ConfigError(
                f"router = {router!r}: must be one of {', '.join(assumed.routing)}"
                + (f"; did you mean {nearest[0]}?" if nearest else "")
            )
    return traced


def work_of(config: Config, router: str, gradient_bytes: int = 4) -> Work:
    """What one token costs.

    A weight takes 2 FLOPs forward and 4 backward; attention reads all S positions of its sequence,
    masked or not.
    """
    model = config.model
    moe = config.moe
    ffn = 2 * model.hidden_size * model.ffn_size
    attention = 4 * model.hidden_size**2
    # Every token has the shared experts of a sparse layer, as it has a dense network.
    dense_ffns = model.num_layers + model.num_moe_layers * (moe.shared_experts - 1)
    gates = model.num_moe_layers * moe.num_experts * model.hidden_size if router == "switch" else 0
    blocks = (
        2 * (model.num_layers * attention + dense_ffns * ffn + gates)
        + 4 * model.num_layers * model.seq_length * model.hidden_size
    )
    passes = 4 if config.train.recompute else 3
    slots = max(1, len(config.domains)) if model.domain_embeddings else 1
    tables = (slots * model.vocab_size + 2 * model.seq_length) * model.hidden_size
    dense = (
        model.num_layers * (attention + 4 * model.hidden_size)
        + (2 * model.hidden_size if model.final_norm else 0)
        + dense_ffns * ffn
        + gates
        + tables
    )
    return Work(
        dense_flops=passes * blocks + 6 * model.hidden_size * model.vocab_size,
        expert_flops=passes * 2 * ffn,
        row_bytes=model.hidden_size * ITEM_BYTES[config.train.precision],
        layers=model.num_layers,
        sparse_layers=model.num_moe_layers,
        dense_bytes=gradient_bytes * dense,
        expert_bytes=gradient_bytes * model.num_moe_layers * ffn,
        recompute=config.train.recompute,
        sequence_parallel=config.parallel.sequence_parallel,
        micro_batches=config.train.accumulation_steps,
    )


def layout_of(config: Config, nodes: int, device: Device, assumed: Assumptions) -> Layout:
    """Who is where in a cluster of that many nodes. Raises TopologyError."""
    parallel = config.parallel
    return Layout(
        nodes,
        assumed.ranks_per_node or device.ranks_per_node,
        config.moe.num_experts,
        assumed.expert_parallel or parallel.expert_parallel,
        assumed.tensor_parallel or parallel.tensor_parallel,
        assumed.copies,
    )


def _row(
    config: Config,
    layout: Layout,
    device: Device,
    assumed: Assumptions,
    router: str,
    share_INE: Floats,
    routed: str,
) -> Row:
    exchange = assumed.exchange or config.parallel.exchange
    several = layout.nodes > 1 and layout.ranks_per_node > 1
    reduction = assumed.reduction or config.parallel.reduction
    sequences = assumed.sequences or config.train.batch_size / layout.replicas
    tokens = sequences * config.model.seq_length
    work = work_of(config, router, assumed.gradient_bytes)
    load_INE = share_INE * tokens * layout.replicas
    rows = rows_of(config, layout, load_INE, device.shared_processor)
    step = step_time(
        work,
        layout,
        device,
        tokens,
        rows.moved_INE,
        rows.computed,
        exchange,
        assumed.exchange_overlap,
        assumed.reduction_overlap,
        reduction or ("hierarchical" if several else "flat"),
    )
    repeated = 1 if exchange == "groupwise" else layout.tensor_parallel
    load_IE = share_INE.sum(axis=1)
    return Row(
        nodes=layout.nodes,
        ranks=layout.nodes * layout.ranks_per_node,
        router=router,
        routed=routed,
        tokens=tokens * layout.replicas,
        step=step,
        moved=traffic(layout, rows.moved_INE, exchange),
        row_bytes=work.row_bytes * repeated,
        crossings=CROSSINGS * work.sparse_layers,
        local_fraction=float((share_INE * layout.local_NE).sum(axis=(1, 2)).mean()),
        max_over_mean_load=float((load_IE.max(axis=1) * layout.experts).mean()),
        dropped_fraction=rows.dropped,
        expert_nodes=layout.nodes
        if layout.copies
        else -(-layout.expert_group_size // layout.replicas_per_node),
    )


def _notes(config: Config, rows: Sequence[Row], device: Device, assumed: Assumptions) -> List[str]:
    notes = [
        (
            f"{device.name}: {device.flops_per_second / 1e12:.4g} TFLOP/s a rank, "
            f"{device.node_bandwidth * device.link_efficiency / 1e9:.4g} GB/s a node's link"
        )
    ]
    if assumed.sequences is None:
        notes.append(
            f"train.batch_size ({config.train.batch_size} sequences) is shared by all "
            "replicas, so a larger cluster has less to do on each"
        )
    else:
        notes.append(
            f"{assumed.sequences:g} sequences on every replica, so the batch grows with the cluster"
        )
    for router in dict.fromkeys(row.router for row in rows if row.routed == "assumed"):
        routing = assumed.routing[router]
        local = (
            "as chance has it"
            if routing.local_fraction is None
            else f"{routing.local_fraction:.0%}"
        )
        notes.append(
            f"assumed of {router}: tokens in their node {local}, fullest expert "
            f"{routing.imbalance:.3g} times the mean"
        )
    if config.parallel.sizes == "static":
        notes.append(
            "parallel.sizes is static: all slots travel and are computed, so routers "
            "differ in what they drop only"
        )
    if any(row.routed == "trace statistics" for row in rows):
        notes.append(
            "the trace has another number of nodes or experts: its local fraction beyond "
            "chance and its max/mean load are used"
        )
    if config.data.sharding == "iid" and any(
        row.routed == "assumed" and (assumed.routing[row.router].local_fraction or 0) > 0
        for row in rows
    ):
        notes.append(
            "data.sharding is iid, with which no routing is local; the assumed local "
            "fraction needs nodes that read different text"
        )
    if (assumed.tensor_parallel or 1) > 1:
        notes.append(
            f"tensor parallelism over {assumed.tensor_parallel} ranks is modelled only; "
            "this version does not train with it"
        )
    wanted = assumed.expert_parallel or config.parallel.expert_parallel
    sizes = _replicas(config, rows, device, assumed)
    if config.model.num_moe_layers and wanted == 1:
        notes.append(
            "parallel.expert_parallel is 1: every replica holds all experts, and nothing is "
            f"exchanged, whatever the router; {_sharing(config, sizes)}"
        )
    notes += [
        (
            f"{count} nodes have {replicas} replicas, fewer than expert_parallel ({wanted}): "
            f"experts are spread over {replicas}"
        )
        for count, replicas in sizes
        if replicas < wanted
    ]
    return notes


def _sharing(config: Config, sizes: Sequence[Tuple[int, int]]) -> str:
    """What to set so that replicas share the experts: the most that can at every size of the
    cluster.
    """
    most = math.gcd(config.moe.num_experts, *(replicas for _, replicas in sizes))
    if most == 1:
        replicas = ", ".join(str(replicas) for _, replicas in sizes)
        return (
            f"set moe.num_experts ({config.moe.num_experts}) and the number of replicas "
            f"({replicas}) so that a parallel.expert_parallel above 1 divides them"
        )
    further = (
        " --set train.recompute=false"
        if config.train.recompute and config.parallel.sizes == "counts"
        else ""
    )
    return (
        "set how many replicas share them, for example --set "
        f"parallel.expert_parallel={most}{further}"
    )


def _replicas(
    config: Config, rows: Sequence[Row], device: Device, assumed: Assumptions
) -> List[Tuple[int, int]]:
    return [
        (count, layout_of(config, count, device, assumed).replicas)
        for count in dict.fromkeys(row.nodes for row in rows)
    ]
