"""The rows of metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np

from pangu_locmoe.config import CapacityConfig, Config
from pangu_locmoe.files import json_text, write_atomic
from pangu_locmoe.moe.capacity import DROPLESS, cosine_statistic
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.step import StepResult

Row = Dict[str, Any]


def training_row(
    config: Config,
    topology: Topology,
    step: int,
    result: StepResult,
    learning_rate: float,
    seconds: float,
    capacities: tuple[int, ...],
    expert_of_slot_LE: Optional[np.ndarray] = None,
    factors: Optional[CapacityConfig] = None,
) -> Dict[str, Any]:
    """One training row; what has no meaning in this run is null.

    delta is the configured statistic of the cosines between tokens and the gates of their experts,
    over all MoE layers; local_fraction the fraction of tokens whose expert is in the node they come
    from; `expert_of_slot_LE` says where experts were. Where a token may have several experts,
    tokens in all of these are its assignments to experts, experts_per_token says how many it asked
    for on average, and unrouted_fraction is the fraction of tokens that no expert kept. In a job of
    several processes also what all ranks sent each other inside nodes and between them (payload),
    and the seconds of the slowest rank in the exchange and in the reduction of the gradients. With
    static sizes there is no capacity, but the slots' local_factor and remote_factor, which
    `factors` has.
    """
    load_LE = result.load_LNE.sum(axis=1)
    routed = int(load_LE.sum())
    gated = bool(result.cosine_LT.any())
    row: Dict[str, Any] = {
        "step": step,
        **result.losses,
        "learning_rate": learning_rate,
        "grad_norm": result.grad_norm,
        "tokens_per_second": config.train.batch_size * config.model.seq_length / seconds,
        "step_seconds": seconds,
        "capacity": max(capacities)
        if capacities and DROPLESS not in capacities and factors is None
        else None,
        "dropped_fraction": int(result.dropped_LE.sum()) / routed if routed else 0.0,
        "max_over_mean_load": float((load_LE.max(axis=1) / load_LE.mean(axis=1)).mean())
        if routed
        else None,
        "local_fraction": topology.local_fraction(result.load_LNE, expert_of_slot_LE)
        if routed and topology.num_nodes > 1
        else None,
        "experts_per_token": routed
        / len(load_LE)
        / (config.train.batch_size * config.model.seq_length)
        if result.unrouted is not None
        else None,
        "unrouted_fraction": result.unrouted,
        "delta": cosine_statistic(result.cosine_LT, config.moe.capacity.statistic)
        if gated
        else None,
    }
    if factors is not None:
        row.update(local_factor=factors.local_factor, remote_factor=factors.remote_factor)
    if result.traffic is not None:
        row.update(
            intra_node_bytes=result.traffic.intra_node_bytes,
            inter_node_bytes=result.traffic.inter_node_bytes,
            intra_node_messages=result.traffic.intra_node_messages,
            inter_node_messages=result.traffic.inter_node_messages,
            exchange_seconds=result.traffic.seconds,
            reduce_intra_node_bytes=result.traffic.reduction.intra_node_bytes,
            reduce_inter_node_bytes=result.traffic.reduction.inter_node_bytes,
            reduce_intra_node_messages=result.traffic.reduction.intra_node_messages,
            reduce_inter_node_messages=result.traffic.reduction.inter_node_messages,
            reduce_seconds=result.traffic.reduce_seconds,
        )
    return row


class MetricsFile:
    """metrics.jsonl, a row a line, each written at once.

    Args:
        path: the file; rows after `last_step` are taken out, because a resumed run writes them
            again, and lines that are not JSON, which a kill cut off. What has no step is somebody
            else's and stays.
    """

    def __init__(self, path: Path, last_step: int = 0) -> None:
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                step = row.get("step") if isinstance(row, dict) else None
                if not isinstance(step, (int, float)) or step <= last_step:
                    kept.append(line + b"\n")
        write_atomic(path, b"".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Dict[str, Any]) -> None:
        """Append one row. Raises OSError."""
        self._file.write(json_text(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
