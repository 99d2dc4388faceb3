"""How many slots a source has for each expert, from moe.capacity.local_factor and remote_factor:
constants. NumPy only.

Letters: E experts, R ranks of an expert-parallel group.
"""

from __future__ import annotations

from typing import Iterator

import numpy as np

from pangu_locmoe.config import CapacityConfig, Config
from pangu_locmoe.config.routers import top_k
from pangu_locmoe.moe.capacity import factor_capacity
from pangu_locmoe.moe.slot_factors import automatic, starting_factors
from pangu_locmoe.parallel.topology import Topology


def source_slots(
    capacity: CapacityConfig, topology: Topology, rank: int, num_tokens: int, choices: int = 1
) -> np.ndarray:
    """Slots that a rank has for each expert, int [E]; `num_tokens` is the rank's T, and a token is
    due `choices` experts.

    With tensor parallelism rounded up, so that the ranks of a replica can share them out evenly.
    """
    capacity, ranks_per_replica = starting_factors(capacity), topology.tensor_parallel
    local, remote = (
        min(
            num_tokens,
            -(
                -factor_capacity(float(factor or 0.0) * choices, num_tokens, topology.num_experts)
                // ranks_per_replica
            )
            * ranks_per_replica,
        )
        for factor in (capacity.local_factor, capacity.remote_factor)
    )
    holders = np.repeat(topology.expert_group(rank), topology.experts_per_rank)
    nodes = holders // topology.ranks_per_node
    return np.where(nodes == topology.node_of_rank(rank), local, remote).astype(np.int64)


def group_slots(
    capacity: CapacityConfig, topology: Topology, rank: int, num_tokens: int, choices: int = 1
) -> np.ndarray:
    """`source_slots` of all ranks of this rank's expert-parallel group, int [R, E]."""
    return np.stack(
        [
            source_slots(capacity, topology, source, num_tokens, choices)
            for source in topology.expert_group(rank)
        ]
    )


def certain_drops(config: Config, topology: Topology, rank: int, num_tokens: int) -> Iterator[str]:
    """What these capacities must drop, one line each; nothing where all tokens could find a
    slot, or slots follow the tokens.
    """
    if automatic(config.moe.capacity):
        return
    choices = top_k(config)
    slots_E = source_slots(config.moe.capacity, topology, rank, num_tokens, choices)
    num_assignments = num_tokens * choices
    holders = (
        np.repeat(topology.expert_group(rank), topology.experts_per_rank) // topology.ranks_per_node
    )
    local_E = holders == topology.node_of_rank(rank)
    if slots_E.sum() < num_assignments:
        yield (
            f"a rank has {slots_E.sum()} slots for {num_assignments} tokens: at least "
            f"{1 - slots_E.sum() / num_assignments:.0%} are dropped"
        )
    elif slots_E[local_E].sum() < num_assignments:
        lost = 1 - slots_E[local_E].sum() / num_assignments
        needed = topology.num_experts / max(1, int(local_E.sum()))
        yield (
            f"if all tokens stay in their node, {lost:.0%} are dropped: "
            f"moe.capacity.local_factor would have to be {needed:g}"
        )
