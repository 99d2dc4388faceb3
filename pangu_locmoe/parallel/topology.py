"""Which node holds which expert and reads which domain: pure data, no communication.

Letters: N nodes, E experts, K domains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pangu_locmoe.config import Config
from pangu_locmoe.errors import TopologyError


@dataclass(frozen=True)
class Topology:
    """Nodes and the experts they hold.

    Args:
        num_nodes: N.
        node_of_expert: for each of the E experts its node, int.
    """

    num_nodes: int
    node_of_expert: tuple[int, ...]

    @classmethod
    def contiguous(cls, num_nodes: int, num_experts: int) -> Topology:
        """Experts in equal contiguous blocks. Raises TopologyError where they do not divide."""
        if num_experts % num_nodes:
            raise TopologyError(f"{num_experts} experts cannot be dealt equally to {num_nodes} nodes")
        return cls(num_nodes, tuple(expert * num_nodes // num_experts for expert in range(num_experts)))

    @classmethod
    def from_config(cls, config: Config) -> Topology:
        return cls.contiguous(config.parallel.emulated_nodes, config.moe.num_experts)

    @property
    def local_NE(self) -> np.ndarray:
        """True where the node holds the expert, bool [N, E]."""
        return np.arange(self.num_nodes)[:, None] == np.asarray(self.node_of_expert)[None, :]

    def home_nodes(self, allowed_KE: np.ndarray) -> tuple[int, ...]:
        """For each domain the node that should read it.

        The node with most of the domain's experts; where several hold as many (single-level routing: all do), the
        domains are dealt to those in order, in equal contiguous runs.

        Args:
            allowed_KE: bool [K, E], which experts a domain may use.
        """
        held_KN = allowed_KE.astype(np.int64) @ self.local_NE.T.astype(np.int64)
        num_domains = len(held_KN)
        homes = []
        for domain, held_N in enumerate(held_KN):
            candidates = np.flatnonzero(held_N == held_N.max())
            homes.append(int(candidates[domain * len(candidates) // num_domains]))
        return tuple(homes)

    def local_fraction(self, load_NE: np.ndarray) -> float:
        """Share of tokens whose expert is in the node they come from.

        Args:
            load_NE: token counts by source node and expert, [..., N, E].
        """
        total = load_NE.sum()
        return float((load_NE * self.local_NE).sum() / total) if total else 0.0
