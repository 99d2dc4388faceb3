"""What the exchanges of a step with constant sizes send, and the reduction of any step: from the
topology and the configuration alone.
"""

from __future__ import annotations

import math
from typing import Iterable, Iterator, List, Optional, Sequence

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import top_k
from pangu_locmoe.moe.slot_sizes import group_slots
from pangu_locmoe.parallel.buckets import Bucket, Weight, buckets
from pangu_locmoe.parallel.exchange import Ledger, Traffic
from pangu_locmoe.parallel.gradients import piece
from pangu_locmoe.parallel.hccl import group_name
from pangu_locmoe.parallel.operation import IR_NAMES, Operation, Shape, messages, topology_groups
from pangu_locmoe.parallel.tensor import Piece
from pangu_locmoe.parallel.topology import Topology


def exchanges(config: Config, topology: Topology, rank: int) -> Iterator[Operation]:
    """Rows to the experts and back; the gradient takes the same ways in the other direction.

    Groupwise, a replica gathers its portions.
    """
    tokens = config.micro_batch * config.model.seq_length // topology.num_replicas
    group = topology.expert_group(rank)
    features = config.model.hidden_size
    size = len(group)
    position = group.index(rank)
    chunks = config.parallel.overlap_chunks
    rows_RR = (
        (group_slots(config.moe.capacity, topology, rank, tokens, top_k(config)) // chunks)
        .reshape(size, size, -1)
        .sum(axis=2)
    )
    carriers = topology.tensor_group(rank) if config.parallel.exchange == "groupwise" else (rank,)
    dtype = IR_NAMES[config.train.precision]
    name = group_name(group, topology.num_ranks)
    gathering = group_name(carriers, topology.num_ranks)
    for direction in ("forward", "backward"):
        for matrix_RR in (rows_RR, rows_RR.T):
            portion_RR = matrix_RR // len(carriers)  # a replica divides its slots evenly
            sent = portion_RR[position]
            arrived = int(portion_RR[:, position].sum())
            move = Operation(
                "AlltoAllV",
                name,
                direction,
                dtype,
                (int(sent.sum()) * features,),
                (arrived * features,),
                tuple(sent.tolist()),
            )
            yield from [move] * config.model.num_moe_layers * chunks
            if len(carriers) > 1:
                gather = Operation(
                    "AllGather",
                    gathering,
                    direction,
                    dtype,
                    (arrived, features),
                    (arrived * len(carriers), features),
                )
                yield from [gather] * config.model.num_moe_layers * chunks


def weight_piece(weight: Weight, config: Config, topology: Topology, rank: int) -> Optional[Piece]:
    """The rank's piece of it with parallel.shard_optimizer; None: its moments are not divided."""
    return (
        piece(weight.shape, weight.kind, topology, rank)
        if config.parallel.shard_optimizer
        else None
    )


def sums(
    config: Config, topology: Topology, rank: int, weights: Sequence[Weight]
) -> Iterator[Operation]:
    """Of the rank's gradients over the ranks that hold the same."""
    for bucket in _buckets(config, topology, rank, weights):
        row = (1, bucket.columns)
        rows = (bucket.parts, bucket.columns)
        kind = "ReduceScatter" if bucket.axes else "AllReduce"
        if bucket.is_alone:
            shape = bucket.shapes[0]
            part = (shape[0] // bucket.parts, *shape[1:]) if bucket.axes else shape
            yield _update(kind, topology, bucket.levels[0], shape, part)
        elif len(bucket.levels) == 1:
            flat = (sum(map(math.prod, bucket.shapes)),)
            shapes = (rows, row) if bucket.axes else (flat, flat)
            yield _update(kind, topology, bucket.levels[0], *shapes)
        else:
            inside, between = bucket.levels
            middle = (len(between), bucket.columns) if bucket.axes else row
            yield _update("ReduceScatter", topology, inside, rows, middle)
            yield _update(kind, topology, between, middle, row)
            if not bucket.axes:
                yield _update("AllGather", topology, inside, row, rows)


def gathers(
    config: Config, topology: Topology, rank: int, weights: Sequence[Weight]
) -> Iterator[Operation]:
    """Of the pieces that the ranks have updated (parallel.shard_optimizer)."""
    for bucket in _buckets(config, topology, rank, weights):
        if not bucket.axes:
            continue
        part: Shape = (1, bucket.columns)
        if bucket.is_alone:
            whole = bucket.shapes[0]
            part = (whole[0] // bucket.parts, *whole[1:])
        for ranks in reversed(bucket.levels):
            result = (part[0] * len(ranks), *part[1:])
            yield _update("AllGather", topology, ranks, part, result)
            part = result


def _buckets(
    config: Config, topology: Topology, rank: int, weights: Sequence[Weight]
) -> List[Bucket]:
    pieces = [weight_piece(weight, config, topology, rank) for weight in weights]
    return buckets(weights, pieces, topology, rank)


def _update(
    kind: str, topology: Topology, ranks: Sequence[int], shape: Shape, result: Shape
) -> Operation:
    name = group_name(ranks, topology.num_ranks)
    return Operation(kind, name, "update", "Float32", shape, result)


def sent(operations: Iterable[Operation], topology: Topology, rank: int) -> Traffic:
    """What operators send from this rank."""
    traffic = Traffic()
    groups = topology_groups(topology, rank)
    for operation in operations:
        for target, num_bytes, count in messages(operation, groups[operation.group], rank):
            crosses = topology.node_of_rank(target) != topology.node_of_rank(rank)
            traffic.record(num_bytes, crosses, count)
    return traffic


def planned_traffic(
    config: Config, topology: Topology, weights: Sequence[Weight] = (), skipped: bool = False
) -> Ledger:
    """What all ranks send in one step, in the exchanges and in the reduction.

    Constant sizes: known without looking. Seconds are not.

    Args:
        config: the run.
        topology: who is where.
        weights: a rank's; all have as many of the same shapes.
        skipped: whether fp16 overflowed: nothing was updated and gathered.
    """
    ledger = Ledger()
    for rank in range(topology.num_ranks):
        exchanged = sent(exchanges(config, topology, rank), topology, rank)
        for _ in range(config.train.accumulation_steps):
            ledger.add(exchanged)
        ledger.reduction.add(sent(sums(config, topology, rank, weights), topology, rank))
        if not skipped:
            ledger.reduction.add(sent(gathers(config, topology, rank, weights), topology, rank))
    return ledger
