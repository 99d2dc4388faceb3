"""What a placement costs: the slowest rank, the busiest node and the experts that have to move.

    seconds of a layer's step = token_seconds * max_r load_r
                              + row_seconds   * max_n max(in_n, out_n)
                              + move_seconds  * moved

load_r: token rows that rank r computes. A row goes to a copy of its expert in its own node if there
is one (evenly over those), otherwise evenly over all copies. out_n, in_n: rows that leave and enter
node n in the dispatch; links are full duplex, and the way back and the backward pass mirror the
dispatch, so each of the 4 crossings lasts as long as this one.
moved: experts that a rank has to hold and does not hold yet. Their bytes go over one link, one
after the other (an upper bound), and are paid off over the horizon. Layers run one after another: a
step's seconds are the sum over the layers. Not modelled: transfers inside a node, overlap of
computing and sending, and the gradients that copies of an expert share.

Letters: L layers, N nodes, R ranks, E experts, P slots (of all ranks, or of one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CROSSINGS = 4  # dispatch and combine, forward and backward


@dataclass(frozen=True)
class Costs:
    """Prices of one layer.

    Attributes:
        token_seconds: computing one token row, forward and backward, on one rank.
        row_bytes: one token row on the wire, one way.
        expert_bytes: one expert's weights and optimizer state.
        link_bytes_per_second: of a node towards the others, each direction.
        horizon: steps for which the placement will be kept.

    Raises:
        DataError: a price is negative or not finite; the speed or the horizon is not positive.
    """

    token_seconds: float
    row_bytes: float
    expert_bytes: float
    link_bytes_per_second: float
    horizon: int

    def __post_init__(self) -> None:
        for name in ("token_seconds", "row_bytes", "expert_bytes"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise DataError(f"{name} ({value}) must be a number and not negative")
        if not (np.isfinite(self.link_bytes_per_second) and self.link_bytes_per_second > 0):
            raise DataError(
                f"link bytes per second ({self.link_bytes_per_second}) must be positive"
            )
        if self.horizon < 1:
            raise DataError(f"horizon ({self.horizon}) must be at least 1 step")

    @classmethod
    def of_model(
        cls,
        hidden_size: int = 768,
        ffn_size: int = 3072,
        flops_per_second: float = 1e14,
        link_bytes_per_second: float = 1.25e10,
        horizon: int = 1000,
        row_value_bytes: int = 2,
        state_value_bytes: int = 12,
    ) -> Costs:
        """Prices from sizes. A trace knows none of them; the defaults assume the paper's 125M model
        (hidden size 768, inner width 4 * 768), a rank that sustains 100 TFLOP/s, and one 100 Gbit/s
        link for each node.

        An expert is two matrices of hidden_size * ffn_size weights without biases. Each weight
        costs a token 2 FLOPs forward and 4 backward, so token_seconds = 12 * hidden_size * ffn_size
        / flops_per_second.

        Args:
            hidden_size, ffn_size: D and F, in values.
            flops_per_second: that one rank sustains on the experts.
            link_bytes_per_second: of one node, each direction.
            horizon: steps.
            row_value_bytes: of one value of a token row; 2: fp16 or bf16.
            state_value_bytes: that move with each weight; 12: an fp32 weight and AdamW's two
                moments.
        """
        for name, value in (
            ("hidden size", hidden_size),
            ("ffn size", ffn_size),
            ("FLOPs per second", flops_per_second),
        ):
            if not value > 0:
                raise DataError(f"{name} ({value}) must be positive")
        weights = 2.0 * hidden_size * ffn_size
        return cls(
            6 * weights / flops_per_second,
            float(hidden_size * row_value_bytes),
            weights * state_value_bytes,
            link_bytes_per_second,
            horizon,
        )

    @property
    def row_seconds(self) -> float:
        """All crossings of one row over its node's link."""
        return CROSSINGS * self.row_bytes / self.link_bytes_per_second

    @property
    def move_seconds(self) -> float:
        """Sending one expert, spread over the horizon, per step."""
        return self.expert_bytes / self.link_bytes_per_second / self.horizon


@dataclass(frozen=True)
class Evaluation:
    """What a placement does to a load.

    Attributes:
        load_LR: token rows each rank computes in a step.
        in_LN, out_LN: token rows that enter and leave a node in the dispatch.
        moved_L: experts that ranks have to fetch.
        run_seconds_L: of a step without the moves.
        seconds_L: with them; the objective.
        slot_load_LP: token rows of each slot.
        inbound_LE: rows from other nodes that each copy of an expert gets.
        copies_LNE: copies of each expert in each node.
    """

    load_LR: Floats
    in_LN: Floats
    out_LN: Floats
    moved_L: Ints
    run_seconds_L: Floats
    seconds_L: Floats
    slot_load_LP: Floats
    inbound_LE: Floats
    copies_LNE: Ints

    @property
    def max_over_mean_L(self) -> Floats:
        """The fullest rank's load over the mean; 1 for a layer without tokens."""
        mean_L = self.load_LR.mean(axis=1)
        return np.divide(
            self.load_LR.max(axis=1), mean_L, out=np.ones_like(mean_L), where=mean_L > 0
        )


def evaluate(
    expert_of_slot_LP: Ints,
    load_LNE: NDArray[Any],
    num_ranks: int,
    costs: Costs,
    held_LRE: Optional[Bools] = None,
) -> Evaluation:
    """The objective of each layer and its parts.

    Args:
        expert_of_slot_LP: int; rank r holds the r-th contiguous block of slots.
        load_LNE: token rows of a step by source node and expert.
        num_ranks: R.
        costs: prices.
        held_LRE: bool, the experts each rank holds now; None: nothing has to move.
    """
    num_layers, num_nodes, num_experts = load_LNE.shape
    node_P = np.arange(expert_of_slot_LP.shape[1]) * num_nodes // expert_of_slot_LP.shape[1]
    layer_L1 = np.arange(num_layers)[:, None]
    copies_LNE = _count(expert_of_slot_LP, num_nodes, num_experts)
    local_LNE = np.where(copies_LNE > 0, load_LNE, 0.0)
    remote_LNE = load_LNE - local_LNE
    inbound_LE = remote_LNE.sum(axis=1) / copies_LNE.sum(axis=1)
    slot_load_LNE = local_LNE / np.maximum(copies_LNE, 1) + inbound_LE[:, None]
    slot_load_LP = slot_load_LNE[layer_L1, node_P, expert_of_slot_LP]
    load_LR = slot_load_LP.reshape(num_layers, num_ranks, -1).sum(axis=2)
    in_LN = np.einsum("lne,le->ln", copies_LNE, inbound_LE)
    out_LN = remote_LNE.sum(axis=2)
    run_L = costs.token_seconds * load_LR.max(axis=1) + costs.row_seconds * np.maximum(
        in_LN, out_LN
    ).max(axis=1)
    moved_L = np.zeros(num_layers, dtype=np.int64)
    if held_LRE is not None:
        expert_LRP = np.sort(expert_of_slot_LP.reshape(num_layers, num_ranks, -1), axis=2)
        new_LRP = ~held_LRE[layer_L1[:, :, None], np.arange(num_ranks)[:, None], expert_LRP]
        new_LRP[:, :, 1:] &= (
            expert_LRP[:, :, 1:] != expert_LRP[:, :, :-1]
        )  # two copies on a rank are fetched once
        moved_L = new_LRP.sum(axis=(1, 2))
    return Evaluation(
        load_LR,
        in_LN,
        out_LN,
        moved_L,
        run_L,
        run_L + costs.move_seconds * moved_L,
        slot_load_LP,
        inbound_LE,
        copies_LNE,
    )


def holdings(expert_of_slot_LP: Ints, num_ranks: int, num_experts: int) -> Bools:
    """Which experts each rank holds, bool [L, R, E]."""
    return _count(expert_of_slot_LP, num_ranks, num_experts) > 0


def _count(expert_of_slot_LP: Ints, num_parts: int, num_experts: int) -> Ints:
    """How often each expert occurs in each of num_parts equal parts of the slots, int64 [L,
    parts, E].
    """
    num_layers, num_slots = expert_of_slot_LP.shape
    part_P = np.arange(num_slots) * num_parts // num_slots
    index_LP = (
        np.arange(num_layers)[:, None] * num_parts + part_P
    ) * num_experts + expert_of_slot_LP
    return np.bincount(index_LP.ravel(), minlength=num_layers * num_parts * num_experts).reshape(
        num_layers, num_parts, num_experts
    )
