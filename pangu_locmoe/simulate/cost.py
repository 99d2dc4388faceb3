"""How long one training step takes on a cluster, from sizes, links and who sends how many rows to
whom. NumPy only.

    step      = dense + experts + straggler + tensor + exchange + reduction - hidden
    dense     = tokens * dense_flops / t / speed                    of one replica; speed = peak_flops * efficiency
    experts   = L * tokens * expert_flops / t / speed               if every replica computed as many rows as it has tokens
    straggler = L * max_u rows_u * expert_flops / t / speed - experts     rows_u: padding included; may be negative with drops
    exchange  = L * 4 * (inter + intra + messages)                  rows there and back, forward and backward
      inter     = row_bytes * max_n max(in_n, out_n) / (node_link * all_to_all_efficiency)
      intra     = row_bytes * max_n inside_n / (ranks of a node * rank_link)   [+ copying, where processors do it]
      messages  = micro_batches * (overhead + inter_latency * i + intra_latency * j)       i, j: messages that one rank sends
    tensor    = 4 (6 with recomputation) all-reduces a layer inside the node, 2 (t-1)/t * tokens * row_bytes / rank_link each
    reduction = between / node_link + inside / (t * rank_link) + latency of the rings
      flat          between = 2 (U-1)/U * dense_bytes + 2 (Z-1)/Z * q * expert_bytes;  inside = 0   [one node: the other way round]
      hierarchical  between = 2 (N-1)/N * dense_bytes + 2 (Y-1)/Y * q * expert_bytes,  Y = Z / c nodes with copies, c in each
                    inside  = 2 (m-1)/m * dense_bytes + 2 (c-1)/c * expert_bytes,      m replicas in a node
    hidden    = min(overlap * exchange, experts + straggler) + min(overlap * reduction, 2/3 of all computation)

A replica is one tensor-parallel group of t ranks (t = 1: a rank); it holds one copy of the dense
weights and its part of the experts. flat: a message for each pair of ranks, q * q for a pair of
nodes; hierarchical: one for a pair of nodes, and rows that cross also move inside both nodes, to
and from the rank that speaks for them. With t > 1 all ranks of a replica hold the same rows: flat
and hierarchical send all of them from each rank, groupwise a portion of 1/t, which is gathered
again inside the node.

Letters: N nodes, U replicas, E experts, L sparse layers, Z expert-parallel groups, q replicas of a
node that work in one group, I samples of routing (layout.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from pangu_locmoe.simulate.devices import Device
from pangu_locmoe.simulate.layout import Floats, Layout, Traffic, traffic

CROSSINGS = 4  # dispatch and combine, forward and backward


@dataclass(frozen=True)
class Work:
    """What the model asks for, whatever the cluster.

    Attributes:
        dense_flops: of one token in everything but experts, forward, backward and recomputation.
        expert_flops: of one row in one sparse layer, likewise.
        row_bytes: one token's row on a link.
        layers, sparse_layers: all of them, and L.
        dense_bytes, expert_bytes: gradients of all but experts, and of one expert in all sparse
            layers.
        recompute: whether the forward pass runs twice. micro_batches: of a step.
        sequence_parallel: whether a replica divides its tokens outside of the matrices.
    """

    dense_flops: float
    expert_flops: float
    row_bytes: float
    layers: int
    sparse_layers: int
    dense_bytes: float
    expert_bytes: float
    recompute: bool = False
    micro_batches: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True)
class Step:
    """Seconds of one step by part; see the equations above.

    `straggler` is what padding and uneven loads add.
    """

    dense: float
    experts: float
    straggler: float
    tensor: float
    exchange_inter: float
    exchange_intra: float
    exchange_latency: float
    reduction: float
    hidden_exchange: float
    hidden_reduction: float

    @property
    def exchange(self) -> float:
        """All of the exchange, hidden or not."""
        return self.exchange_inter + self.exchange_intra + self.exchange_latency

    @property
    def seconds(self) -> float:
        computing = self.dense + self.experts + self.straggler + self.tensor
        return (
            computing
            + self.exchange
            + self.reduction
            - self.hidden_exchange
            - self.hidden_reduction
        )

    @property
    def exchange_share(self) -> float:
        """Fraction of the step in which nothing but the exchange goes on."""
        return (self.exchange - self.hidden_exchange) / self.seconds


def step_time(
    work: Work,
    layout: Layout,
    device: Device,
    tokens: float,
    rows_INE: Floats,
    computed: float,
    exchange: str = "flat",
    exchange_overlap: float = 0.0,
    reduction_overlap: float = 0.0,
    reduction: str = "flat",
) -> Step:
    """Seconds of one step.

    Args:
        work, layout, device: what is computed, where, on what.
        tokens: of one replica in one step.
        rows_INE: rows that travel in one layer from each node to each expert, samples first.
        computed: rows of the replica that computes most of them in one layer, padding included,
            mean over the samples.
        exchange: flat, hierarchical or groupwise.
        exchange_overlap: fraction of the exchange that runs under experts, where they last long
            enough.
        reduction_overlap: fraction of the reduction that runs under the backward pass, where it
            lasts long enough.
        reduction: flat or hierarchical.
    """
    t = layout.tensor_parallel
    layers = work.sparse_layers
    speed = device.flops_per_second * t
    dense = tokens * work.dense_flops / speed
    even, slowest = (layers * rows * work.expert_flops / speed for rows in (tokens, computed))
    inter, intra, latency = _exchange(
        work, layout, device, traffic(layout, rows_INE, exchange), exchange
    )
    tensor = 0.0
    if t > 1:
        rank_link = device.intra_bandwidth * device.link_efficiency
        passes = 6 if work.recompute else 4
        one = 2 * (t - 1) / t * tokens * work.row_bytes / rank_link
        tensor = (
            passes * work.layers * (one + work.micro_batches * 2 * (t - 1) * device.intra_latency)
        )
        # the rows to be routed are gathered, and so is the gradient of what comes back: half a sum
        # each
        if work.sequence_parallel:
            tensor += work.sparse_layers * (
                one + work.micro_batches * 2 * (t - 1) * device.intra_latency
            )
    reducing = _reduction(work, layout, device, reduction == "hierarchical")
    computing = dense + slowest
    return Step(
        dense=dense,
        experts=even,
        straggler=slowest - even,
        tensor=tensor,
        exchange_inter=inter,
        exchange_intra=intra,
        exchange_latency=latency,
        reduction=reducing,
        hidden_exchange=min(exchange_overlap * (inter + intra + latency), slowest),
        hidden_reduction=min(reduction_overlap * reducing, 2 / 3 * computing),
    )


def _exchange(
    work: Work, layout: Layout, device: Device, moved: Traffic, exchange: str
) -> Tuple[float, float, float]:
    """Seconds between nodes, inside nodes, and for messages whatever their size."""
    if layout.expert_group_size == 1:
        return 0.0, 0.0, 0.0
    t = layout.tensor_parallel
    node_link, rank_link = (
        bandwidth * device.link_efficiency
        for bandwidth in (device.node_bandwidth, device.intra_bandwidth)
    )
    repeated = 1 if exchange == "groupwise" else t
    row_bytes = work.row_bytes * repeated
    inter = row_bytes * moved.busiest_link / (node_link * device.all_to_all_efficiency)
    intra = row_bytes * moved.busiest_inside / (layout.ranks_per_node * rank_link)
    if exchange == "groupwise":
        intra += (t - 1) / t * moved.gathered * work.row_bytes / rank_link
    if device.copy_bandwidth is not None:
        intra += (
            row_bytes
            * (moved.inter_rows + moved.intra_rows)
            / (layout.nodes * layout.ranks_per_node * device.copy_bandwidth)
        )
    messages = (
        device.exchange_overhead
        + moved.inter_messages * device.inter_latency
        + moved.intra_messages * device.intra_latency
    )
    crossings = CROSSINGS * work.sparse_layers
    return crossings * inter, crossings * intra, crossings * work.micro_batches * messages


def _reduction(work: Work, layout: Layout, device: Device, by_node: bool) -> float:
    """Over all replicas for dense gradients, over the copies for each expert's.

    A ring over all leaves each node once. By node, rings inside of the nodes come first, and those
    between the nodes have a rank of each. What a rank sends is the same, on other links.
    """
    if layout.replicas == 1:
        return 0.0
    t = layout.tensor_parallel
    nodes = layout.nodes
    held_bytes = work.expert_bytes * layout.experts / layout.expert_group_size
    dense = _around(layout.replicas) * work.dense_bytes
    experts = _around(layout.expert_groups) * held_bytes
    between = dense + layout.neighbours * experts
    inside = 0.0
    if nodes == 1:
        between, inside = 0.0, dense + experts
    elif by_node:
        copies = max(1, min(layout.expert_groups, layout.replicas_per_node // layout.neighbours))
        between = (
            _around(nodes) * work.dense_bytes
            + layout.neighbours * _around(layout.expert_groups // copies) * held_bytes
        )
        inside = _around(layout.replicas_per_node) * work.dense_bytes + _around(copies) * held_bytes
    seconds = (
        between / device.node_bandwidth + inside / t / device.intra_bandwidth
    ) / device.link_efficiency
    if device.copy_bandwidth is not None:
        seconds += (dense + experts) / t / device.copy_bandwidth
    rings = 1 + (layout.expert_groups > 1)
    return seconds + rings * 2 * (
        (nodes - 1) * device.inter_latency + (layout.replicas_per_node - 1) * device.intra_latency
    )


def _around(members: int) -> float:
    """What a ring's member sends, in sizes of what is added up."""
    return 2 * (members - 1) / members
