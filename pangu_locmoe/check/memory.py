"""What one rank of an Ascend job keeps in its device's memory during a step.

Weights, gradients and Adam's moments are exact: they are the compiled step's parameters. HCCL's
buffers are what its documentation says. Copies, activations and workspace are estimated from what
the layers' gradients use (nn/functional.py, moe/): no device has been asked, but MindSpore's plans
were (scripts/ascend_memory.py). Not counted: index maps, what the compiler keeps or frees otherwise,
workspaces inside of operators, fragmentation, the code of the graph.

Activations go as gradients come: what counts is the fullest moment of a step.

Letters: T tokens of this rank (B sequences of S), D hidden, F inner width, H heads, V vocabulary, E
experts, M rows of this rank's experts. F, H and V are divided by the tensor-parallel size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Sequence

from pangu_locmoe.check.communication import buffer_megabytes
from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import top_k
from pangu_locmoe.moe.slot_sizes import group_slots
from pangu_locmoe.parallel.buckets import Weight
from pangu_locmoe.parallel.operation import ITEM_BYTES
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.step.traffic import weight_piece

_FP32 = 4
_LAST = ("query_layer.", "query_table", "word_table")
"""parameters whose gradients come first"""
_FLASH_ROWS = (
    2 * 8 * _FP32
)  # softmax's maximum and sum of each query and head, eight of each, for flash attention's gradient


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    weights, gradients, moments: fp32. With parallel.shard_optimizer the weights' pieces count as
    weights and moments are divided.
    accumulated: the buffers of the gradients that accumulation and fp16 have besides.
    copies: the matrices in the precision of the products, which the backward pass needs again.
    Estimated.
    activations: what the backward pass needs, by part of the model. Estimated.
    workspace: intermediate results of the largest operator. Estimated.
    moments_of_step: what moments of a step need beside what is there all the time. Estimated.
    buffers: HCCL's, for sending and receiving in each group.
    on_host: fp32 moments that the host has instead (train.offload_expert_optimizer); not in the
    total.
    """

    weights: int
    gradients: int
    moments: int
    accumulated: int
    copies: int
    activations: Dict[str, int]
    workspace: int
    moments_of_step: Dict[str, int]
    buffers: int
    on_host: int = 0

    @property
    def total(self) -> int:
        """At the fullest moment of a step."""
        lasting = self.weights + self.moments + self.accumulated + self.buffers
        return lasting + max(self.moments_of_step.values())

    def format(self, precision: str) -> List[str]:
        """Lines for people, in GB of 1e9 bytes, as devices are sold."""
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.activations.items())
        state = (
            f"weights {self.weights / 1e9:.2f}, gradients "
            f"{(self.gradients + self.accumulated) / 1e9:.2f}, Adam's "
            f"moments {self.moments / 1e9:.2f}"
        )
        kept = (
            f"weights in {precision} {self.copies / 1e9:.2f}, activations "
            f"{sum(self.activations.values()) / 1e9:.2f}"
        )
        return [
            f"memory of this rank, GB: {state}; HCCL's buffers {self.buffers / 1e9:.2f}"
            + (f"; on the host {self.on_host / 1e9:.2f}" if self.on_host else ""),
            (
                f"estimated, GB: {kept} ({parts}), workspace {self.workspace / 1e9:.2f}; at most "
                f"at once {self.total / 1e9:.2f}"
            ),
        ]

    def to_dict(self) -> Dict[str, Any]:
        return {**asdict(self), "total": self.total}


def estimate(
    config: Config, topology: Topology, rank: int, weights: Sequence[Weight], num_groups: int
) -> Memory:
    """The memory of one rank's step.

    Args:
        config: the run, with parallel.sizes: static.
        topology: who holds what.
        rank: whose.
        weights: the rank's, of all layers.
        num_groups: HCCL groups it is in.
    """
    numbers = sum(math.prod(weight.shape) for weight in weights)
    divided = [
        (math.prod(weight.shape), weight_piece(weight, config, topology, rank))
        for weight in weights
    ]
    pieces = sum(size // piece.count for size, piece in divided if piece is not None)
    moments = [
        2 * _FP32 * (size if piece is None else size // piece.count) for size, piece in divided
    ]
    host = (
        sum(size for size, weight in zip(moments, weights) if weight.kind == "expert")
        if config.train.offload_expert_optimizer
        else 0
    )
    buffers = numbers + pieces if config.train.has_buffers else 0
    sizes = _Sizes(config, topology, rank)
    copies = _copies(config, weights)
    last = sum(math.prod(weight.shape) for weight in weights if weight.name.startswith(_LAST))
    return Memory(
        weights=_FP32 * (numbers + pieces),
        gradients=_FP32 * numbers,
        moments=sum(moments) - host,
        accumulated=_FP32 * buffers,
        copies=copies,
        activations=sizes.activations(),
        workspace=sizes.workspace(),
        moments_of_step=_moments(sizes, copies, _FP32 * numbers, _FP32 * last),
        buffers=num_groups * 2 * 2**20 * buffer_megabytes(config, topology.num_ranks),
        on_host=host,
    )


def _moments(sizes: _Sizes, copies: int, gradients: int, last: int) -> Dict[str, int]:
    """Bytes at the moments of a step that may be the fullest.

    Args:
        sizes: of the model's parts.
        copies: of the matrices.
        gradients: of all parameters.
        last: of those whose gradients come first: the query layer and the word table.
    """
    parts = sizes.activations()
    workspace = copies + sizes.workspace()
    blocks = parts["mask"] + parts["dense blocks"] + parts["sparse blocks"]
    block = max(sizes.dense_block(), sizes.sparse_block())
    moments = {
        "forward": workspace + sum(parts.values()) + last,
        "gradient of the first block": workspace + parts["mask"] + block + gradients,
        # Half of the gradients are there twice while they are reduced.
        "update": gradients * 3 // 2,
    }
    if sizes.config.train.recompute:  # it has its activations back
        moments["gradient of the last block"] = workspace + blocks + block + last
    return moments


def _copies(config: Config, weights: Sequence[Weight]) -> int:
    item = ITEM_BYTES[config.train.precision]
    if item == _FP32:
        return 0
    # Rows are taken from the position and query tables before they are rounded; norms stay in fp32.
    rounded = [
        weight
        for weight in weights
        if len(weight.shape) > 1 and not weight.name.endswith(("position_table", "query_table"))
    ]
    return item * sum(math.prod(weight.shape) for weight in rounded)


class _Sizes:
    """Bytes of the model's parts on one rank, from the sizes that they depend on."""

    def __init__(self, config: Config, topology: Topology, rank: int) -> None:
        model = config.model
        split = topology.tensor_parallel
        self.config = config
        self.item = ITEM_BYTES[config.train.precision]
        self.sequences = config.micro_batch // topology.num_replicas
        self.length = model.seq_length
        self.tokens = self.sequences * model.seq_length
        self.hidden = model.hidden_size
        self.heads = model.num_heads // split
        self.inner = model.ffn_size // split
        self.vocabulary = model.vocab_size // split
        self.own_hidden = model.hidden_size // split  # features of this rank's heads
        slots_RE = group_slots(config.moe.capacity, topology, rank, self.tokens, top_k(config))
        held = topology.experts_of_rank(rank)
        self.rows = int(slots_RE[:, held.start : held.stop].sum())
        self.row_bytes = (
            self.tokens * self.hidden * self.item
        )  # one [T, D] in the precision of the products
        self.own_tokens = self.tokens // (
            split if config.parallel.sequence_parallel else 1
        )  # of norms, dropout and residuals

    def activations(self) -> Dict[str, int]:
        """By part; the mask is made once for all layers."""
        model = self.config.model
        again = self.config.train.recompute
        dense = model.num_layers - 1 - model.num_moe_layers
        sparse = model.num_moe_layers
        # The inputs of what is recomputed; where rows are divided they are gathered outside of it,
        # and kept beside the rank's own.
        kept = 2 * (
            self.row_bytes
            + (self.own_tokens * self.hidden * self.item if self.own_tokens < self.tokens else 0)
        )
        return {
            "mask": self.sequences
            * self.length**2
            * (1 if self.config.train.fused else _FP32 * self.heads),
            "dense blocks": dense * (kept if again else self.dense_block()),
            "sparse blocks": sparse
            * (kept + self.routing() + self.expert_rows() if again else self.sparse_block()),
            # Its queries are not its keys' operand: one [T, D] more than a block's.
            "query layer": self.dense_block()
            + self.row_bytes
            + (self.norm() if model.final_norm else 0),
            "head": self.row_bytes + self.tokens * self.vocabulary * _FP32,
        }

    def workspace(self) -> int:
        """Of the largest operator."""
        scores = (
            0
            if self.config.train.fused
            else 2 * self.sequences * self.heads * self.length**2 * _FP32
        )
        logits = self.tokens * self.vocabulary * (_FP32 + self.item)
        inner = 3 * max(self.tokens, self.rows) * self.inner * _FP32
        return max(scores, logits, inner)

    def dense_block(self) -> int:
        """Attention and a feed-forward network."""
        return (
            self.attention()
            + self.norm()
            + self.row_bytes
            + self.network(self.tokens)
            + self.dropout()
        )

    def sparse_block(self) -> int:
        """Attention and an MoE layer."""
        return (
            self.attention()
            + self.norm()
            + self.routing()
            + self.expert_rows()
            + self.network(self.rows)
            + self.shared()
            + self.dropout()
        )

    def shared(self) -> int:
        """The shared experts' network."""
        return self.config.moe.shared_experts * self.network(self.tokens)

    def norm(self) -> int:
        """The rows in fp32, and two numbers for each."""
        return self.own_tokens * (self.hidden + 2) * _FP32

    def attention(self) -> int:
        """LN1 and attention: the projections' operands, Q, K, V, the probabilities, and the
        mixed values before and after transposing.
        """
        own = self.tokens * self.own_hidden * self.item
        square = self.sequences * self.heads * self.length
        probabilities = (
            square * _FLASH_ROWS if self.config.train.fused else square * self.length * self.item
        )
        mixed = (
            own if self.config.train.fused else self.tokens * self.own_hidden * _FP32
        )  # the portable layer keeps it in fp32
        return self.norm() + self.row_bytes + 3 * own + probabilities + mixed + own

    def network(self, rows: int) -> int:
        """x W_in and its GELU."""
        return rows * self.inner * 2 * self.item

    def routing(self) -> int:
        """The router's fp32 operand, about four [T, E], and combine's rows and spread weights."""
        return (
            self.tokens * (self.hidden + 4 * self.config.moe.num_experts) * _FP32
            + 2 * self.row_bytes
        )

    def expert_rows(self) -> int:
        """The experts' operand: all slots, filled or not."""
        return self.rows * self.hidden * self.item

    def dropout(self) -> int:
        """Two masks."""
        return 2 * self.own_tokens * self.hidden * self.item if self.config.model.dropout else 0
