"""What the ranks of an Ascend job must send each other in one step: from the topology and the
configuration alone.

Letters: R ranks of the expert-parallel group, E experts, D hidden.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Iterator, List, Sequence

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import top_k
from pangu_locmoe.moe import balance
from pangu_locmoe.moe.routers import router_class
from pangu_locmoe.moe.slot_sizes import group_slots
from pangu_locmoe.parallel.buckets import Weight
from pangu_locmoe.parallel.hccl import group_name
from pangu_locmoe.parallel.operation import IR_NAMES, ITEM_BYTES, Operation, Shape
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.step.traffic import exchanges, gathers, sums, weight_piece

CommunicationPlan = List[Operation]
"""The communication operators of a rank's step."""


def communication_plan(
    config: Config, topology: Topology, rank: int, weights: Sequence[Weight]
) -> CommunicationPlan:
    """Every communication operator that the step of this rank needs, once for each time it runs
    in one micro-batch.
    """
    return [
        *exchanges(config, topology, rank),
        *_tensor_sums(config, topology, rank),
        *_statistics(config, topology, rank),
        *_reductions(config, topology, rank, weights),
    ]


def _tensor_sums(config: Config, topology: Topology, rank: int) -> Iterator[Operation]:
    """Over the ranks of a replica: what leaves each pair of matrices, the gradient of what enters
    it, the embedding and the loss.

    With sequence parallelism rows are gathered where they enter and scattered where they leave, and
    the other way round backward. Recomputation repeats none of them: what leaves a layer is not
    needed again inside of it, and what enters is kept.
    """
    if topology.tensor_parallel == 1:
        return
    model = config.model
    own = topology.tensor_group(rank)
    tokens = config.micro_batch // topology.num_replicas * model.seq_length
    features = model.hidden_size
    chunks = config.parallel.overlap_chunks
    slots_RE = group_slots(config.moe.capacity, topology, rank, tokens, top_k(config)) // chunks
    held = topology.experts_of_rank(rank)
    whole = (tokens, features)
    part = (tokens // topology.tensor_parallel, features)
    rows_GCD = (len(held), int(slots_RE[:, held.start].sum()), features)
    layers = model.num_layers
    sparse = model.num_moe_layers
    dense = layers - sparse
    shared = sparse if config.moe.shared_experts else 0
    rounded = IR_NAMES[config.train.precision]
    name = group_name(own, topology.num_ranks)

    def operations(
        kind: str, direction: str, dtype: str, shape: Shape, result: Shape, times: int
    ) -> List[Operation]:
        return [Operation(kind, name, direction, dtype, shape, result)] * times

    for direction, dtype, shape, times in (
        ("forward", rounded, rows_GCD, sparse * chunks),
        (
            "forward",
            "Float32",
            (topology.tensor_parallel, tokens),
            1,
        ),  # the loss: largest logits, then sums
        ("forward", "Float32", (2, tokens), 1),
        ("backward", rounded, whole, 1),  # the query layer's queries
        ("backward", rounded, rows_GCD, sparse * chunks),
    ):
        yield from operations("AllReduce", direction, dtype, shape, shape, times)
    leaving = (
        ("Float32", 1),
        (rounded, layers + dense + shared),
    )  # the embedding; attention and feed-forward networks
    entering = layers + dense + 1  # the same and the head, but for the shared experts
    if not config.parallel.sequence_parallel:
        for dtype, times in leaving:
            yield from operations("AllReduce", "forward", dtype, whole, whole, times)
        yield from operations("AllReduce", "backward", rounded, whole, whole, entering + shared)
        return
    yield from operations("AllReduce", "backward", rounded, whole, whole, shared)
    for dtype, times in leaving:
        yield from operations("ReduceScatter", "forward", dtype, whole, part, times)
        yield from operations("AllGather", "backward", dtype, part, whole, times)
    yield from operations(
        "AllGather", "forward", rounded, part, whole, entering + sparse
    )  # rows to be routed, too
    yield from operations("ReduceScatter", "backward", rounded, whole, part, entering)
    yield from operations(
        "AllGather", "backward", rounded, part, whole, sparse
    )  # the gradient of what comes back from the experts


def _statistics(config: Config, topology: Topology, rank: int) -> Iterator[Operation]:
    """Counts and mean probabilities of all ranks, for the balance and the locality loss and the
    load trace; the histograms of moe.balance: quantile.
    """
    numbers = 2 * config.moe.num_experts
    world = group_name(range(topology.num_ranks), topology.num_ranks)
    gather = Operation(
        "AllGather", world, "forward", "Float32", (1, numbers), (topology.num_ranks, numbers)
    )
    yield from [gather] * config.model.num_moe_layers
    router = router_class(config)
    if config.moe.balance == "quantile" and router.traits.has_balance_bias:
        options = router.options(config).shape[1]  # type: ignore[attr-defined]
        shape = (options * balance.BINS + max(1, len(config.domains)),)
        group = group_name(topology.same_part(rank), topology.num_ranks)
        histogram = Operation("AllReduce", group, "forward", "Float32", shape, shape)
        yield from [histogram] * (len(balance.WINDOWS) * config.model.num_moe_layers)


def _reductions(
    config: Config, topology: Topology, rank: int, weights: Sequence[Weight]
) -> Iterator[Operation]:
    """Gradients, the experts', slices' and pieces' part of their norm, and weights from their
    pieces.
    """
    yield from sums(config, topology, rank, weights)
    yield from gathers(config, topology, rank, weights)
    size = topology.num_ranks
    pieces = any(weight_piece(weight, config, topology, rank) for weight in weights)
    world = tuple(range(size)) if pieces else ()
    for group in (topology.expert_group(rank), topology.tensor_group(rank), world):
        if len(group) > 1:
            yield Operation("AllReduce", group_name(group, size), "update", "Float32", (1,), (1,))


def differences(planned: Sequence[Operation], compiled: Sequence[Operation]) -> List[str]:
    """One line for every operator of which plan and graph have different numbers, whatever their
    direction.
    """
    planned, compiled = (
        [dataclasses.replace(operation, direction="") for operation in operations]
        for operations in (planned, compiled)
    )
    wanted = Counter(planned)
    got = Counter(compiled)
    return [
        f"{operation.describe()}: {wanted[operation]} in the plan, {got[operation]} in the graph"
        for operation in dict.fromkeys([*planned, *compiled])
        if wanted[operation] != got[operation]
    ]


def buffer_megabytes(config: Config, num_ranks: int) -> int:
    """HCCL_BUFFSIZE: the documentation's recommendation for language models, tokens * hidden size *
    bytes, at least its default.

    The exchange's messages are the largest of the forward pass; with static sizes they are known
    and count if larger.
    """
    topology = Topology.from_config(config, num_ranks)
    tokens = config.micro_batch * config.model.seq_length // topology.num_replicas
    largest = tokens * config.model.hidden_size * ITEM_BYTES[config.train.precision]
    if config.parallel.sizes == "static":
        largest = max([largest, *(operation.bytes for operation in exchanges(config, topology, 0))])
    return max(200, math.ceil(largest / 2**20))
