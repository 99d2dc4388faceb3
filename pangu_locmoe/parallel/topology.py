"""Which rank is in which node, holds which experts and works with whom: pure data, no
communication.

Ranks are numbered node by node. `tensor_parallel` consecutive ranks of one node, a tensor-parallel
group, share the matrices of what would be one rank without: a *replica*. They read the same tokens.
The experts of a layer are dealt to `expert_parallel` consecutive replicas, which hold all experts
once; replicas at the same position of different such blocks hold the same ones. A rank exchanges
tokens with the ranks of its block that hold the same part of their matrices, its expert-parallel
group.

Letters: N nodes, R ranks, U replicas, E experts, P expert slots, J domains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import numpy as np

from pangu_locmoe.config import Config
from pangu_locmoe.errors import TopologyError


@dataclass(frozen=True)
class Topology:
    """Ranks, nodes and experts.

    Args:
        num_ranks: R, processes of the job (or nodes that one process emulates).
        ranks_per_node: ranks in each node.
        expert_parallel: replicas that share the experts of a layer.
        num_experts: E.
        tensor_parallel: ranks of a replica.
        reduces_by_node: whether gradients are joined and added up inside each node first.

    Raises:
        TopologyError: the numbers do not divide each other.
    """

    num_ranks: int
    ranks_per_node: int
    expert_parallel: int
    num_experts: int
    tensor_parallel: int = 1
    reduces_by_node: bool = False

    def __post_init__(self) -> None:
        replicas = "ranks" if self.tensor_parallel == 1 else "ranks / parallel.tensor_parallel"
        for name, value, divisor_name, divisor in (
            ("ranks", self.num_ranks, "ranks of a node", self.ranks_per_node),
            (
                "ranks of a node",
                self.ranks_per_node,
                "parallel.tensor_parallel",
                self.tensor_parallel,
            ),
            (replicas, self.num_replicas, "parallel.expert_parallel", self.expert_parallel),
            ("moe.num_experts", self.num_experts, "parallel.expert_parallel", self.expert_parallel),
        ):
            if value % divisor:
                raise TopologyError(
                    f"{name} ({value}) must be divisible by {divisor_name} ({divisor})"
                )

    @classmethod
    def emulated(cls, num_nodes: int, num_experts: int) -> Topology:
        """One process that stands for `num_nodes` nodes of one rank each."""
        return cls(num_nodes, 1, num_nodes, num_experts)

    @classmethod
    def from_config(cls, config: Config, num_ranks: int = 1) -> Topology:
        """The topology of a job of `num_ranks` processes, as many in each of parallel.nodes; one
        process emulates the nodes.

        A dense model has it too: its nodes then read the same domains as those of the sparse models
        it is compared with.
        """
        parallel = config.parallel
        num_experts = config.moe.num_experts
        if num_ranks == 1:
            for key in ("expert_parallel", "tensor_parallel"):
                if getattr(parallel, key) > 1:
                    raise TopologyError(
                        f"parallel.{key} = {getattr(parallel, key)}: there is 1 process, "
                        "for which it must be 1 (parallel.nodes may be more: it emulates "
                        "them); "
                        "or start more with scripts/train_cpu_cluster.sh"
                    )
            if parallel.shard_optimizer:
                raise TopologyError(
                    "parallel.shard_optimizer = True: there is 1 process, which has nobody "
                    "to divide the moments with; must be false"
                )
            return cls.emulated(parallel.nodes, num_experts)
        if num_ranks % parallel.nodes:
            raise TopologyError(
                f"ranks ({num_ranks}) must be divisible by parallel.nodes "
                f"({parallel.nodes}): every node has as many; "
                f"start {-(-num_ranks // parallel.nodes) * parallel.nodes}, or set "
                f"parallel.nodes to {math.gcd(num_ranks, parallel.nodes)}"
            )
        if num_ranks // parallel.nodes % parallel.tensor_parallel:
            raise TopologyError(
                f"ranks of a node ({num_ranks} / parallel.nodes {parallel.nodes} = "
                f"{num_ranks // parallel.nodes}) must be divisible by "
                f"parallel.tensor_parallel ({parallel.tensor_parallel}), whose ranks are "
                "in one node: start more, or set fewer nodes"
            )
        topology = cls(
            num_ranks,
            num_ranks // parallel.nodes,
            parallel.expert_parallel,
            num_experts,
            parallel.tensor_parallel,
            parallel.reduction == "hierarchical"
            or (parallel.reduction is None and 1 < parallel.nodes < num_ranks),
        )
        batch_size = config.train.batch_size
        micro_batches = config.train.accumulation_steps
        replicas = topology.num_replicas
        if batch_size % (replicas * micro_batches):
            what = "ranks" if topology.tensor_parallel == 1 else "ranks / parallel.tensor_parallel"
            raise TopologyError(
                f"train.batch_size ({batch_size}) must be divisible by {what} ({replicas}) "
                f"times train.accumulation_steps ({micro_batches})"
            )
        return topology

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def num_replicas(self) -> int:
        """U, among which a batch is divided."""
        return self.num_ranks // self.tensor_parallel

    @property
    def replicas_per_node(self) -> int:
        return self.ranks_per_node // self.tensor_parallel

    @property
    def experts_per_rank(self) -> int:
        """Experts of which a rank holds its part: all of it without tensor parallelism."""
        return self.num_experts // self.expert_parallel

    def node_of_rank(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def replica_of_rank(self, rank: int) -> int:
        return rank // self.tensor_parallel

    def tensor_group(self, rank: int) -> tuple[int, ...]:
        """The ranks of the same replica, which share its matrices, itself among them."""
        first = rank - rank % self.tensor_parallel
        return tuple(range(first, first + self.tensor_parallel))

    def same_part(self, rank: int) -> tuple[int, ...]:
        """The ranks of all replicas that hold the same part of their matrices as this one, itself
        among them.
        """
        return tuple(range(rank % self.tensor_parallel, self.num_ranks, self.tensor_parallel))

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """The ranks with which this one exchanges tokens, itself among them."""
        block = self.expert_parallel * self.tensor_parallel
        first = rank - rank % block + rank % self.tensor_parallel
        return tuple(range(first, first + block, self.tensor_parallel))

    def same_experts(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same part of the same experts as this one, itself among them."""
        block = self.expert_parallel * self.tensor_parallel
        return tuple(range(rank % block, self.num_ranks, block))

    def groups(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Every group that a rank can be in, by what it is; several may have the same ranks."""
        world = "the world"
        experts = "the group that holds the same experts"
        part = "the group with the same part of the matrices"
        groups = {
            world: tuple(range(self.num_ranks)),
            "its expert-parallel group": self.expert_group(rank),
            experts: self.same_experts(rank),
            "its tensor-parallel group": self.tensor_group(rank),
            part: self.same_part(rank),
        }
        for name in (world, experts, part):
            levels = self.reduction_levels(groups[name], rank)
            if len(levels) == 2:
                groups[f"{name}, in its node"] = levels[0]
                groups[f"{name}, at its place in every node"] = levels[1]
        if f"{experts}, in its node" in groups:
            del groups[experts]  # a group costs memory, and experts' gradients alone would use it
        return groups

    def reduction_levels(self, ranks: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """Over which groups, one after the other, what `ranks` hold is added up.

        By node, where each of several nodes has equally many of them, several: this rank's node,
        then the ranks at its place in every node. Else all in one; none where there is one rank.
        """
        if len(ranks) == 1:
            return ()
        if self.reduces_by_node:
            nodes = [self.node_of_rank(other) for other in ranks]
            inside = tuple(r for r in ranks if self.node_of_rank(r) == self.node_of_rank(rank))
            even = {nodes.count(node) for node in nodes} == {len(inside)}
            if even and 1 < len(inside) < len(ranks):
                return inside, tuple(ranks[inside.index(rank) :: len(inside)])
        return (tuple(ranks),)

    def experts_of_rank(self, rank: int) -> range:
        """The contiguous block of experts a rank holds, or holds a part of."""
        first = self.replica_of_rank(rank) % self.expert_parallel * self.experts_per_rank
        return range(first, first + self.experts_per_rank)

    @property
    def local_NE(self) -> np.ndarray:
        """True where a rank of the node holds the expert, bool [N, E]."""
        held_NE = np.zeros((self.num_nodes, self.num_experts), dtype=bool)
        for rank in range(self.num_ranks):
            held_NE[self.node_of_rank(rank), list(self.experts_of_rank(rank))] = True
        return held_NE

    def home_nodes(self, allowed_JE: np.ndarray) -> tuple[int, ...]:
        """For each domain the node that should read it.

        The node with most of the domain's experts; where several hold as many (single-level
        routing: all do), the domains are dealt to those in order, in equal contiguous runs.

        Args:
            allowed_JE: bool [J, E], which experts a domain may use.
        """
        held_JN = allowed_JE.astype(np.int64) @ self.local_NE.T.astype(np.int64)
        num_domains = len(held_JN)
        homes = []
        for domain, held_N in enumerate(held_JN):
            candidates = np.flatnonzero(held_N == held_N.max())
            homes.append(int(candidates[domain * len(candidates) // num_domains]))
        return tuple(homes)

    def local_fraction(
        self, load_LNE: np.ndarray, expert_of_slot_LP: np.ndarray | None = None
    ) -> float:
        """Fraction of the tokens whose expert is in the node they come from.

        Args:
            load_LNE: token counts by source node and expert.
            expert_of_slot_LP: where experts are, if they were moved.
        """
        local_LNE = np.broadcast_to(self.local_NE, load_LNE.shape)
        if expert_of_slot_LP is not None:
            local_LNE = self.local_NE[:, np.argsort(expert_of_slot_LP, axis=1)].swapaxes(0, 1)
        total = load_LNE.sum()
        return float((load_LNE * local_LNE).sum() / total) if total else 0.0
