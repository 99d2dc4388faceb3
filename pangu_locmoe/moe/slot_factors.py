"""moe.capacity.local_factor and remote_factor `auto`: slots that follow the measured counts, in a
few sizes.

Every 20 steps the counts of that step say which factors would have been enough. Factors are powers
of 1.25, so that a run needs few compiled shapes and comes back to those it has; counts are taken
10% higher than measured, as a margin. A factor grows at once and shrinks only when two sizes
smaller would do. One step's counts decide, and nothing is remembered but the factors themselves: an
interrupted run goes on as it would have.
"""

from __future__ import annotations

import math
from typing import Any, Dict

import numpy as np

from pangu_locmoe.config import CapacityConfig
from pangu_locmoe.parallel.topology import Topology

EVERY = 20
RATIO = 1.25
MARGIN = 1.1
DROPS = 0.005  # fraction of all tokens that local slots, and remote slots, may leave out


def automatic(capacity: CapacityConfig) -> bool:
    """Whether a factor follows the counts."""
    return "auto" in (capacity.local_factor, capacity.remote_factor)


def starting_factors(capacity: CapacityConfig) -> CapacityConfig:
    """With numbers for `auto`: moe.capacity.factor for both, because routing is not local at
    first.
    """
    return capacity.model_copy(
        update={
            key: capacity.factor
            for key in ("local_factor", "remote_factor")
            if getattr(capacity, key) == "auto"
        }
    )


def next_factors(
    wanted: CapacityConfig,
    now: CapacityConfig,
    load_LNE: np.ndarray,
    topology: Topology,
    num_assignments: int | None = None,
) -> CapacityConfig:
    """The factors after a step.

    Args:
        wanted: the configuration, in which a factor is `auto` or a number that stays.
        now: the factors of the step, numbers.
        load_LNE: tokens (their assignments, where a token may have several experts) by source node
            and expert before drops.
        topology: a node's tokens are shared evenly by its ranks.
        num_assignments: that are due in the step, of which the factors are; None: a layer's load,
            where a token has as many experts as it is due.
    """
    due = load_LNE.sum() / load_LNE.shape[0] if num_assignments is None else num_assignments
    base = due / topology.num_replicas / topology.num_experts
    local_LNE = np.broadcast_to(topology.local_NE, load_LNE.shape)
    factors: Dict[str, Any] = {}
    for key, chosen_LNE in (("local_factor", local_LNE), ("remote_factor", ~local_LNE)):
        if getattr(wanted, key) == "auto":
            need_X = load_LNE[chosen_LNE] * MARGIN / topology.replicas_per_node / base
            needed = _smallest(
                need_X, DROPS * MARGIN * load_LNE.sum() / topology.replicas_per_node / base
            )
            current = getattr(now, key)
            factors[key] = (
                needed if needed > current or needed * RATIO**2 <= current * (1 + 1e-9) else current
            )
    return now.model_copy(update=factors)


def _smallest(need_X: np.ndarray, may_drop: float) -> float:
    """The smallest power of RATIO that, as a limit, takes at most `may_drop` from the needs
    together.
    """
    exponent = math.ceil(
        math.log(max(float(need_X.max(initial=0.0)), RATIO**-16)) / math.log(RATIO) - 1e-9
    )
    while exponent > -16 and np.maximum(need_X - RATIO ** (exponent - 1), 0).sum() <= may_drop:
        exponent -= 1
    return float(RATIO**exponent)
