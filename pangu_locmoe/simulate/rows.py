"""From routed tokens to rows that travel and rows that are computed, as the trainer has them.

NumPy only.

counts: the routed tokens travel. An expert keeps at most ceil(factor * tokens / E) of its group's,
and the experts of a replica are padded to the fullest of them. static: every slot travels and is
computed, filled or not.

Letters: N nodes, E experts, U replicas of a group, I samples, Z expert-parallel groups that differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

import numpy as np

from pangu_locmoe.config import Config
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.moe.capacity import factor_capacity
from pangu_locmoe.moe.slot_factors import automatic, next_factors, starting_factors
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.simulate.layout import Floats, Layout


@dataclass(frozen=True)
class Rows:
    """One layer's rows in a step.

    Attributes:
        moved_INE: from each node to each expert.
        computed: of the replica that computes most, mean over the samples; where all replicas share
            a processor the mean replica's.
        dropped: fraction of the tokens that no expert takes.
    """

    moved_INE: Floats
    computed: float
    dropped: float


def rows_of(
    config: Config, layout: Layout, load_INE: Floats, shared_processor: bool = False
) -> Rows:
    """What `load_INE` tokens become.

    Micro-batches are alike, so each has its part of the step's tokens and of its capacity.
    """
    batches = config.train.accumulation_steps
    if config.parallel.sizes == "static":
        moved_INE, dropped = _slots(config, layout, load_INE / batches)
        computed_IZU = _by_replica(layout, layout.load_IZE(moved_INE)).sum(axis=3)
    else:
        moved_INE = load_INE / batches
        load_IZE = layout.load_IZE(moved_INE)
        group_tokens = float(moved_INE.sum() / len(moved_INE) / layout.expert_groups)
        limit = (
            np.inf
            if config.moe.capacity.policy == "dropless"
            else factor_capacity(config.moe.capacity.factor, group_tokens, layout.experts)
        )
        dropped = float(np.maximum(load_IZE - limit, 0).sum() / max(load_IZE.sum(), 1e-300))
        load_IZUE = _by_replica(layout, load_IZE)
        computed_IZU = np.minimum(load_IZUE.max(axis=3), limit) * load_IZUE.shape[3]
    replicas = layout.expert_group_size if layout.copies else layout.replicas
    mean_I = computed_IZU.sum(axis=2).mean(axis=1) / replicas
    computed_I = mean_I if shared_processor else computed_IZU.max(axis=(1, 2))
    return Rows(moved_INE * batches, float(computed_I.mean() * batches), dropped)


def _by_replica(layout: Layout, load_IZE: Floats) -> Floats:
    """[I, Z, U, experts of a replica]."""
    return load_IZE.reshape(*load_IZE.shape[:2], layout.expert_group_size, -1)


def _slots(config: Config, layout: Layout, load_INE: Floats) -> Tuple[Floats, float]:
    """Slots of each node for each expert, the same in all samples, and the fraction of tokens
    without one.
    """
    tokens = float(load_INE.sum() / len(load_INE) / layout.replicas)
    capacity = starting_factors(config.moe.capacity)
    if automatic(config.moe.capacity):
        if not layout.copies:
            raise ConfigError(
                "moe.capacity: factors must be numbers where one copy of the experts "
                "serves all nodes, not auto"
            )
        topology = Topology(
            layout.replicas, layout.replicas_per_node, layout.expert_group_size, layout.experts
        )
        capacity = next_factors(config.moe.capacity, capacity, load_INE, topology)
    local, remote = (
        min(tokens, factor_capacity(float(factor or 0), tokens, layout.experts))
        for factor in (capacity.local_factor, capacity.remote_factor)
    )
    slots_NE = np.where(layout.local_NE, local, remote) * layout.replicas_per_node
    dropped = np.maximum(load_INE - slots_NE, 0).sum() / max(load_INE.sum(), 1e-300)
    return np.tile(slots_NE, (len(load_INE), 1, 1)).astype(np.float64), float(dropped)
