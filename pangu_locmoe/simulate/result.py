"""What a simulation assumes and what it gives: rows as JSON and as a table."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

from pangu_locmoe.errors import ConfigError
from pangu_locmoe.simulate.cost import Step
from pangu_locmoe.simulate.devices import Device
from pangu_locmoe.simulate.layout import Traffic
from pangu_locmoe.simulate.routing import ASSUMED, Routing

EXCHANGES = ("flat", "hierarchical", "groupwise")
REDUCTIONS = ("flat", "hierarchical")


@dataclass(frozen=True)
class Assumptions:
    """What the configuration does not say, or says differently.

    Attributes:
        tensor_parallel, expert_parallel, exchange, reduction: None: the configuration's. More than
            one rank for a matrix is modelled only: the trainer does not have it.
        ranks_per_node: None: the device's.
        sequences: of one replica in one step, at any size of the cluster; None: train.batch_size,
            shared by all replicas.
        copies: expert-parallel groups repeat over the cluster; False: there is one, and nodes
            beyond it hold no expert.
        exchange_overlap, reduction_overlap: fractions that run under computation. The trainer
            overlaps nothing.
        gradient_bytes: of one value in the reduction.
        routing: of each router.

    Raises:
        ConfigError: a number is out of its range.
    """

    tensor_parallel: Optional[int] = None
    expert_parallel: Optional[int] = None
    exchange: Optional[str] = None
    reduction: Optional[str] = None
    ranks_per_node: Optional[int] = None
    sequences: Optional[float] = None
    copies: bool = True
    exchange_overlap: float = 0.0
    reduction_overlap: float = 0.0
    gradient_bytes: int = 4
    routing: Mapping[str, Routing] = field(default_factory=lambda: dict(ASSUMED))

    def __post_init__(self) -> None:
        for key in ("exchange_overlap", "reduction_overlap"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"{key} = {getattr(self, key)}: must be between 0 and 1")
        for key in (
            "tensor_parallel",
            "expert_parallel",
            "ranks_per_node",
            "sequences",
            "gradient_bytes",
        ):
            value = getattr(self, key)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{key} = {value}: must be above 0")
        for key, allowed in (("exchange", EXCHANGES), ("reduction", REDUCTIONS)):
            if getattr(self, key) not in (None, *allowed):
                raise ConfigError(
                    f"{key} = {getattr(self, key)!r}: must be one of {', '.join(allowed)}"
                )


@dataclass(frozen=True)
class Row:
    """One router on one cluster. `routed`: assumed, trace, or trace statistics."""

    nodes: int
    ranks: int
    router: str
    routed: str
    tokens: float
    step: Step
    moved: Traffic
    row_bytes: float
    crossings: int
    local_fraction: float
    max_over_mean_load: float
    dropped_fraction: float
    expert_nodes: int

    def to_dict(self) -> Dict[str, Any]:
        step = self.step
        parts = {f"{name}_seconds": seconds for name, seconds in dataclasses.asdict(step).items()}
        return {
            "nodes": self.nodes,
            "ranks": self.ranks,
            "router": self.router,
            "step_seconds": step.seconds,
            "exchange_share": step.exchange_share,
            "exchange_seconds": step.exchange,
            **parts,
            "tokens_per_second": self.tokens / step.seconds,
            "routing": self.routed,
            "local_fraction": self.local_fraction,
            "max_over_mean_load": self.max_over_mean_load,
            "dropped_fraction": self.dropped_fraction,
            "expert_nodes": self.expert_nodes,
            "inter_node_bytes": self.crossings * self.row_bytes * self.moved.inter_rows,
            "intra_node_bytes": self.crossings * self.row_bytes * self.moved.intra_rows,
            "inter_messages_of_rank": self.moved.inter_messages,
            "inter_messages_of_node": self.moved.node_messages,
        }


@dataclass(frozen=True)
class Simulation:
    """All rows, and what they rest on."""

    rows: List[Row]
    device: Device
    assumptions: Assumptions
    notes: List[str]

    def to_dict(self) -> Dict[str, Any]:
        """For --json."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "device": self.device.to_dict(),
            "assumptions": dataclasses.asdict(self.assumptions),
            "notes": self.notes,
        }

    def format(self) -> str:
        """A table for people."""
        names = (
            "nodes",
            "ranks",
            "router",
            "step, s",
            "tokens/s",
            "exchange",
            "dense",
            "experts",
            "straggler",
            "tensor",
            "between",
            "inside",
            "messages",
        )
        table: List[Tuple[str, ...]] = [
            (*names, "reduction", "hidden", "local", "max/mean", "dropped", "MB between")
        ]
        for row in self.rows:
            step = row.step
            values = row.to_dict()
            parts = (
                step.dense,
                step.experts,
                step.straggler,
                step.tensor,
                step.exchange_inter,
                step.exchange_intra,
                step.exchange_latency,
            )
            columns = (
                *parts,
                step.reduction,
                -(step.hidden_exchange + step.hidden_reduction) or 0.0,
            )
            table.append(
                (
                    *(
                        f"{row.nodes:,}",
                        f"{row.ranks:,}",
                        row.router,
                        f"{step.seconds:.4g}",
                        f"{values['tokens_per_second']:,.0f}",
                    ),
                    *(
                        f"{step.exchange_share:.1%}",
                        *(f"{part / step.seconds:.1%}" for part in columns),
                    ),
                    *(
                        f"{row.local_fraction:.1%}",
                        f"{row.max_over_mean_load:.2f}",
                        f"{row.dropped_fraction:.1%}",
                        f"{values['inter_node_bytes'] / 1e6:,.1f}",
                    ),
                )
            )
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in table
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
