"""A communication operator of a compiled step: what a rank sends in it, and to whom. Pure data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Dict, Sequence, Tuple

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


def node_bytes(
    operation: Operation, ranks: Sequence[int], topology: Topology, rank: int
) -> Tuple[int, int]:
    """Bytes of an AlltoAllV, or an AllGather, to other ranks in this rank's node, and to other
    nodes.
    """
    row_bytes = operation.bytes // max(1, sum(operation.sent))
    inside = between = 0
    for target, rows in zip(ranks, operation.sent or [1] * len(ranks)):
        if topology.node_of_rank(target) != topology.node_of_rank(rank):
            between += rows * row_bytes
        elif target != rank:
            inside += rows * row_bytes
    return inside, between
