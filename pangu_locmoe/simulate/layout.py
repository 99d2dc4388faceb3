"""Where replicas and experts are, and what one crossing of one layer moves between them.

NumPy only.

A replica is one tensor-parallel group of ranks; its ranks are in one node. Replicas are numbered
node by node.

Letters: N nodes, U replicas, E experts, q replicas of a node that work in one
group, I samples of routing, Z expert-parallel groups that differ in what they get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import TopologyError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Where replicas and experts are.

    Replicas are numbered node by node; experts are dealt to them in contiguous blocks.

    Args:
        nodes, ranks_per_node: of the cluster.
        experts: E.
        expert_parallel: replicas that share the experts of a layer; more than there are: all.
        tensor_parallel: t, ranks of a replica; they are in one node.
        copies: the groups of replicas that hold the experts repeat over the cluster; False: there
            is one, and the nodes beyond it hold no expert.

    Raises:
        TopologyError: the numbers do not divide each other.
    """

    nodes: int
    ranks_per_node: int
    experts: int
    expert_parallel: int
    tensor_parallel: int = 1
    copies: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "copies" and value < 1:
                raise TopologyError(f"{name} ({value}) must be at least 1")
        pairs = [
            ("ranks_per_node", self.ranks_per_node, "tensor_parallel", self.tensor_parallel),
            ("experts", self.experts, "expert_parallel", self.expert_group_size),
        ]
        if self.copies:
            pairs.append(("replicas", self.replicas, "expert_parallel", self.expert_group_size))
        larger = max(self.expert_group_size, self.replicas_per_node)
        smaller = min(self.expert_group_size, self.replicas_per_node)
        pairs.append(
            ("the larger of expert_parallel and replicas of a node", larger, "the other", smaller)
        )
        for name, value, divisor_name, divisor in pairs:
            if value % divisor:
                raise TopologyError(
                    f"{name} ({value}) must be divisible by {divisor_name} ({divisor})"
                )
        if not self.copies and self.expert_group_size < self.replicas_per_node:
            raise TopologyError(
                f"one copy of the experts on {self.expert_group_size} replicas: must fill a node "
                f"({self.replicas_per_node} replicas)"
            )

    @property
    def replicas_per_node(self) -> int:
        return max(1, self.ranks_per_node // self.tensor_parallel)

    @property
    def replicas(self) -> int:
        """P."""
        return self.nodes * self.replicas_per_node

    @property
    def expert_group_size(self) -> int:
        """Replicas over which the experts of a layer are spread."""
        return min(self.expert_parallel, self.replicas)

    @property
    def expert_groups(self) -> int:
        """Z, copies of every expert."""
        return self.replicas // self.expert_group_size if self.copies else 1

    @property
    def neighbours(self) -> int:
        """q, replicas of one node in one group."""
        return min(self.expert_group_size, self.replicas_per_node)

    @property
    def home_NE(self) -> Ints:
        """The node whose copy of the expert a node's tokens go to."""
        node_E = (
            np.arange(self.experts)
            * self.expert_group_size
            // self.experts
            // self.replicas_per_node
        )
        span = (
            max(1, self.expert_group_size // self.replicas_per_node) if self.copies else self.nodes
        )
        first_N = np.arange(self.nodes) // span * span
        return first_N[:, None] + node_E

    @property
    def local_NE(self) -> NDArray[np.bool_]:
        """Whether that copy is in the node itself."""
        return self.home_NE == np.arange(self.nodes)[:, None]

    def load_IZE(self, rows_INE: Floats) -> Floats:
        """Rows that each copy of each expert gets, [I, groups that differ, E]; groups inside one
        node share its rows evenly.
        """
        if not self.copies:
            return rows_INE.sum(axis=1, keepdims=True)
        span = max(1, self.expert_group_size // self.replicas_per_node)
        by_group = rows_INE.reshape(len(rows_INE), self.nodes // span, span, self.experts).sum(
            axis=2
        )
        return by_group / max(1, self.replicas_per_node // self.expert_group_size)


@dataclass(frozen=True)
class Traffic:
    """What one crossing of one layer moves, means over the samples.

    Rows of the whole cluster, or of the busiest node.

    Attributes:
        inter_rows, intra_rows: rows that change the node, and that change the rank only; of the
            cluster.
        busiest_link: rows through the busiest end of a node's link.
        busiest_inside: rows between the ranks of the node that has most of them.
        gathered: rows that a replica receives, mean over replicas: what groupwise gathers.
        inter_messages, intra_messages: that one rank sends at most; of any size.
        node_messages: that one node sends to the others.
    """

    inter_rows: float
    intra_rows: float
    busiest_link: float
    busiest_inside: float
    gathered: float
    inter_messages: int
    intra_messages: int
    node_messages: int


def traffic(layout: Layout, rows_INE: Floats, exchange: str = "flat") -> Traffic:
    """Follow every row once.

    Args:
        layout: who is where.
        rows_INE: rows that travel from each node to each expert, empty slots included.
        exchange: flat, hierarchical or groupwise.
    """
    home_NE = layout.home_NE
    local_NE = layout.local_NE
    q = layout.neighbours
    remote_INE = np.where(local_NE, 0.0, rows_INE)
    local_IN = rows_INE.sum(axis=2) - remote_INE.sum(axis=2)
    out_IN = remote_INE.sum(axis=2)
    in_IN = np.stack(
        [
            np.bincount(home_NE.ravel(), weights=remote_NE.ravel(), minlength=layout.nodes)
            for remote_NE in remote_INE
        ]
    )
    inside_IN = local_IN * (1 - 1 / q)
    if exchange == "hierarchical":
        inside_IN = inside_IN + (out_IN + in_IN) * (1 - 1 / q)
    inter, intra, of_node = _messages(layout, exchange) if out_IN.any() else (0, q - 1, 0)
    return Traffic(
        inter_rows=float(out_IN.sum(axis=1).mean()),
        intra_rows=float(inside_IN.sum(axis=1).mean()),
        busiest_link=float(np.maximum(in_IN, out_IN).max(axis=1).mean()),
        busiest_inside=float(inside_IN.max(axis=1).mean()),
        gathered=float(rows_INE.sum(axis=(1, 2)).mean() / layout.replicas),
        inter_messages=inter,
        intra_messages=intra,
        node_messages=of_node,
    )


def _messages(layout: Layout, exchange: str) -> Tuple[int, int, int]:
    """One rank's messages to other nodes and inside its node, and those of its node to the
    others; the busiest ones.
    """
    q = layout.neighbours
    others = (
        layout.expert_group_size if layout.copies else layout.replicas
    ) // q - 1  # nodes that one node talks to
    if exchange == "hierarchical":
        return -(-others // q), 3 * (q - 1), others
    return others * q, q - 1, others * q * q
