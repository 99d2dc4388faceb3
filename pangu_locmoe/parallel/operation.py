"""A communication operator of a compiled step: what a rank sends in it, and to whom. Pure data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Sequence, Tuple

from pangu_locmoe.parallel.exchange import Traffic
from pangu_locmoe.parallel.hccl import group_name
from pangu_locmoe.parallel.topology import Topology

ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
IR_NAMES = {"fp32": "Float32", "fp16": "Float16", "bf16": "BFloat16"}
Shape = Tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One communication operator of the step's graph.

    kind: AlltoAllV, AllReduce, AllGather or ReduceScatter.
    group: its name. direction: forward, backward or update; empty where it is not known.
    dtype: as the graph writes it. shape, result: of this rank's operand and result.
    sent: rows to each rank of the group (AlltoAllV), else empty.
    """

    kind: str
    group: str
    direction: str
    dtype: str
    shape: Shape
    result: Shape
    sent: Tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of this rank's operand."""
        return math.prod(self.shape) * (4 if self.dtype == "Float32" else 2)

    def describe(self) -> str:
        return (
            f"{self.kind} on {self.group}, {self.dtype} {list(self.shape)} -> {list(self.result)}"
        )

    def to_dict(self) -> Dict[str, Any]:
        return {**dataclasses.asdict(self), "bytes": self.bytes}


def topology_groups(topology: Topology, rank: int) -> Dict[str, Tuple[int, ...]]:
    """All groups that a rank can be in, by HCCL's name."""
    return {
        group_name(ranks, topology.num_ranks): ranks for ranks in topology.groups(rank).values()
    }


def messages(
    operation: Operation, ranks: Sequence[int], rank: int
) -> Iterator[Tuple[int, int, int]]:
    """To whom an operator sends from this rank, how many bytes, in how many messages.

    An AllReduce is counted as a ring: twice as many messages as there are others, all to the next
    rank, each of one part. A ReduceScatter, an AllGather and an AlltoAllV are counted as one
    message to each of the others.
    """
    size = len(ranks)
    if operation.kind == "AllReduce":
        following = ranks[(list(ranks).index(rank) + 1) % size]
        yield following, 2 * (size - 1) * operation.bytes // size, 2 * (size - 1)
        return
    parts = operation.sent or (1,) * size
    whole = size if operation.kind == "ReduceScatter" else max(1, sum(operation.sent))
    for target, rows in zip(ranks, parts):
        if target != rank:
            yield target, rows * (operation.bytes // whole), 1


def node_bytes(
    operation: Operation, ranks: Sequence[int], topology: Topology, rank: int
) -> Tuple[int, int]:
    """Bytes to other ranks in this rank's node, and to other nodes; see `messages`."""
    traffic = Traffic()
    for target, num_bytes, count in messages(operation, ranks, rank):
        crosses = topology.node_of_rank(target) != topology.node_of_rank(rank)
        traffic.record(num_bytes, crosses, count)
    return traffic.intra_node_bytes, traffic.inter_node_bytes
