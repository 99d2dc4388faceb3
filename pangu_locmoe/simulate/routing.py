"""Who sends how many rows to whom: assumed for each router, or taken from a load trace. NumPy only.

An assumed routing has two numbers. With w_e the experts' popularity (the first has `imbalance`
times the mean, the others share the rest evenly) and c_n its sum over the experts that node n's
tokens find in their node, the share of n's tokens for expert e is

    w_e * local_fraction / c_n    if it is in node n,        w_e * (1 - local_fraction) / (1 - c_n)    if it is not

and w_e by chance, or where a node has none of the experts or all.

Letters: N nodes, E experts, W rows of a trace, L sparse layers, I samples (rows times layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Optional, Tuple

import numpy as np

from pangu_locmoe.errors import ConfigError, DataError
from pangu_locmoe.expert_load.trace import Trace, share
from pangu_locmoe.simulate.layout import Floats, Layout

MOST_STEPS = 32  # of a trace; their means do not move with more


@dataclass(frozen=True)
class Routing:
    """What is assumed of a router.

    Attributes:
        local_fraction: fraction of a node's tokens whose expert is in the node, where it holds any;
            None: what chance gives.
        imbalance: load of the fullest expert over the mean, from 1 to the number of experts.

    Raises:
        ConfigError: a number is out of its range.
    """

    local_fraction: Optional[float] = None
    imbalance: float = 1.0

    def __post_init__(self) -> None:
        if self.local_fraction is not None and not 0 <= self.local_fraction <= 1:
            raise ConfigError(f"local fraction {self.local_fraction}: must be between 0 and 1")
        if not (np.isfinite(self.imbalance) and self.imbalance >= 1):
            raise ConfigError(f"imbalance {self.imbalance}: must be a number of at least 1")


# Small trainings here, one level, nodes that read different text (docs/locality.md): hash 1.1 (its
# tables are balanced by token
# frequency), switch 1.3 to 1.5, locmoe 1.2 to 1.4 and 88 to 92% local.
ASSUMED: Dict[str, Routing] = {
    "hash": Routing(None, 1.1),
    "switch": Routing(None, 1.4),
    "locmoe": Routing(0.9, 1.3),
}


def assumed_shares(layout: Layout, routing: Routing) -> Floats:
    """Share of all tokens that goes from each node to each expert, [1, N, E]; sums to 1."""
    experts = layout.experts
    popularity_E = np.full(experts, 1 / experts)
    if experts > 1:
        first = min(routing.imbalance, experts) / experts
        popularity_E = np.array([first, *[(1 - first) / (experts - 1)] * (experts - 1)])
    share_NE = np.tile(popularity_E, (layout.nodes, 1))
    local_NE = layout.local_NE
    chance_N = (share_NE * local_NE).sum(axis=1)
    if routing.local_fraction is not None:
        some_N = (chance_N > 0) & (chance_N < 1)
        scale_N = np.divide(
            routing.local_fraction, chance_N, out=np.ones_like(chance_N), where=some_N
        )
        rest_N = np.divide(
            1 - routing.local_fraction, 1 - chance_N, out=np.ones_like(chance_N), where=some_N
        )
        share_NE = share_NE * np.where(local_NE, scale_N[:, None], rest_N[:, None])
    return share_NE[None] / layout.nodes


def trace_shares(trace: Trace, layout: Layout) -> Tuple[Floats, str]:
    """The same from the second half of a trace, a sample for each step and layer, [I, N, E], and
    how it was made.

    A trace of as many nodes and experts is taken as it is. Of other sizes only its local fraction,
    as far as it is beyond chance, and its max/mean load are taken over to an assumed routing.

    Raises:
        DataError: the trace has no rows, or its experts are not spread evenly over its nodes.
    """
    rows = len(trace.step_W)
    if rows == 0:
        raise DataError("the trace has no rows")
    picked = np.unique(np.linspace(rows // 2, rows - 1, MOST_STEPS).astype(int))
    load_IE = trace.load_WLE[picked].reshape(-1, trace.load_WLE.shape[2]).astype(np.float64)
    experts = load_IE.shape[1]
    if trace.source_WLNE is not None and trace.source_WLNE.shape[2:] == (
        layout.nodes,
        layout.experts,
    ):
        source_INE = (
            trace.source_WLNE[picked].reshape(-1, layout.nodes, layout.experts).astype(np.float64)
        )
        total_I11 = source_INE.sum(axis=(1, 2), keepdims=True)
        return np.divide(
            source_INE,
            total_I11,
            out=np.full(source_INE.shape, 1 / source_INE[0].size),
            where=total_I11 > 0,
        ), "trace"
    imbalance = float((share(load_IE).max(axis=1) * experts).mean())
    local = None
    if trace.source_WLNE is not None:
        nodes = trace.source_WLNE.shape[2]
        if experts % nodes:
            raise DataError(
                f"the trace has {experts} experts on {nodes} nodes: experts must be "
                "divisible by nodes"
            )
        home_E = np.arange(experts) * nodes // experts
        source_NE = trace.source_WLNE[picked].sum(axis=(0, 1))
        measured = float(source_NE[home_E, np.arange(experts)].sum() / max(1, source_NE.sum()))
        beyond = (measured - 1 / nodes) / (1 - 1 / nodes) if nodes > 1 else 0.0
        chance = float(
            layout.local_NE.any(axis=1).sum()
            and layout.local_NE[layout.local_NE.any(axis=1)].mean()
        )
        local = min(1.0, max(0.0, chance + beyond * (1 - chance)))
    return assumed_shares(layout, Routing(local, imbalance)), "trace statistics"
