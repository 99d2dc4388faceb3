"""Tokens to expert buffers and back.

An assignment (moe/plan.py: a token's way to one of its experts) has one slot, or none;
`repeat_rows` makes a row of it, and `sum_choices` a token's output of its assignments'. Buffers are
[G, C, D]: G groups of C slots, all rows of a group for one expert. With a fixed capacity there is
one group for each expert, and assignments at position C or later are dropped. Dropless, C is the
block size and G = min(A, E + A // C) blocks always suffice: an expert takes as many blocks as its
assignments need, and `expert_of_group_G` says whose a block is. A slot has at most one row and a
row at most one slot, so both directions are gathers, and so are both gradients.

Two index maps say all of it. Both are one-based with 0 for "none", so that row 0 can be the zero
row: `row_of_slot_Q` int32 [Q = G*C] and `slot_of_row_A` int32 [A].

Letters: T tokens, A assignments (or received rows), D hidden, E experts, G groups, C slots in a
group, Q = G*C slots.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn, ops

from pangu_locmoe.nn.device import on_ascend


def position_within_expert(one_hot_AE: Tensor, affinity_A: Optional[Tensor]) -> Tensor:
    """How many assignments of the same expert come before each, int32 [A].

    Args:
        one_hot_AE: the expert of each assignment as fp32 ones and zeros.
        affinity_A: highest first, ties by position (the sort is stable); None: by position.
    """
    if affinity_A is None:
        return _count_before(one_hot_AE)
    order_A = ops.cast(_ascending(-affinity_A)[1], ms.int32)
    position_A = _count_before(ops.gather(one_hot_AE, order_A, 0))
    return ops.scatter_nd(ops.expand_dims(order_A, 1), position_A, order_A.shape)


def _ascending(values_A: Tensor) -> Tuple[Tensor, Tensor]:
    """Sorted values and where they were, equal ones in the order in which they come.

    On Ascend the operator is asked for that; ops.sort, which the CPU has alone, loses accuracy in
    fp32 there (so does this one on a 910A, which sorts fp32 as fp16).
    """
    return mint.sort(values_A, stable=True) if _on_ascend() else ops.sort(values_A)


@ops.constexpr(reuse_result=False)
def _on_ascend() -> bool:
    return on_ascend()


def _count_before(one_hot_AE: Tensor) -> Tensor:
    # Counts are exact in fp32 up to 2^24 tokens.
    return ops.cast(ops.reduce_sum(ops.cumsum(one_hot_AE, 0) * one_hot_AE, 1), ms.int32) - 1


def capacity_slots(expert_A: Tensor, position_A: Tensor, capacity: int) -> Tensor:
    """`slot_of_row_A` with a fixed capacity: the first `capacity` of each expert get one."""
    return (expert_A * capacity + position_A + 1) * ops.cast(
        ops.less(position_A, capacity), ms.int32
    )


def block_size(num_tokens: int, num_experts: int) -> int:
    """Slots in a dropless block: a balanced expert fills one, and no plan needs more than about
    twice the tokens.
    """
    return -(-num_tokens // num_experts)


def num_blocks(num_tokens: int, num_experts: int) -> int:
    """Blocks that suffice for any plan."""
    return min(num_tokens, num_experts + num_tokens // block_size(num_tokens, num_experts))


def block_slots(expert_A: Tensor, position_A: Tensor, load_E: Tensor) -> Tuple[Tensor, Tensor]:
    """`slot_of_row_A` with room for every assignment, and the expert of each block, int32 [G]
    (spare ones: the last).
    """
    num_tokens = expert_A.shape[0]
    num_experts = load_E.shape[0]
    block = block_size(num_tokens, num_experts)
    blocks_E = ops.floor((load_E + float(block - 1)) / float(block))
    end_E = ops.cumsum(blocks_E, 0)
    start_E = ops.cast(end_E - blocks_E, ms.int32)
    slot_of_row_A = ops.gather(start_E, expert_A, 0) * block + position_A + 1
    groups_G = Tensor(np.arange(num_blocks(num_tokens, num_experts), dtype=np.float32))
    ended_GE = ops.cast(
        ops.less_equal(ops.expand_dims(end_E, 0), ops.expand_dims(groups_G, 1)), ms.float32
    )
    expert_of_group_G = ops.minimum(
        ops.cast(ops.reduce_sum(ended_GE, 1), ms.int32), num_experts - 1
    )
    return slot_of_row_A, expert_of_group_G


def row_of_slot(slot_of_row_A: Tensor, num_slots: int) -> Tensor:
    """`row_of_slot_Q`, the inverse of `slot_of_row_A`."""
    one_based_A = Tensor(np.arange(1, slot_of_row_A.shape[0] + 1, dtype=np.int32))
    # ScatterNd adds: all dropped rows land at index 0, which is cut off. Half of
    # TensorScatterUpdate's time.
    return ops.scatter_nd(ops.expand_dims(slot_of_row_A, 1), one_based_A, (num_slots + 1,))[1:]


def repeat_rows(x_TD: Tensor, choices: int) -> Tensor:
    """x_AD: each token's row for each of its `choices` assignments."""
    return x_TD if choices == 1 else ops.reshape(ops.tile(x_TD, (1, choices)), (-1, x_TD.shape[1]))


def sum_choices(y_AD: Tensor, choices: int) -> Tensor:
    """y_TD: the sum over each token's `choices` assignments."""
    return (
        y_AD if choices == 1 else ops.reduce_sum(ops.reshape(y_AD, (-1, choices, y_AD.shape[1])), 1)
    )


def unrouted_fraction(y_TD: Tensor) -> Tensor:
    """Fraction of the tokens without any expert, whose output is zero: an expert's is not. fp32
    scalar.
    """
    largest_T = ops.reduce_max(ops.abs(ops.stop_gradient(y_TD)), 1)
    return ops.reduce_mean(ops.cast(ops.equal(largest_T, 0), ms.float32))


class Dispatch(nn.Cell):
    """x_AD -> slots_QD, zero in empty slots; a dropped row gets a zero gradient."""

    def construct(self, x_AD: Tensor, row_of_slot_Q: Tensor, slot_of_row_A: Tensor) -> Tensor:
        return _rows(x_AD, row_of_slot_Q)

    def bprop(
        self,
        x_AD: Tensor,
        row_of_slot_Q: Tensor,
        slot_of_row_A: Tensor,
        out: Tensor,
        grad_QD: Tensor,
    ) -> Tuple[Tensor, Tensor, Tensor]:
        return (
            _rows(grad_QD, slot_of_row_A),
            ops.zeros_like(row_of_slot_Q),
            ops.zeros_like(slot_of_row_A),
        )


class Combine(nn.Cell):
    """slots_QD -> y_AD = weight_A * slots[slot_of_row_A], zero for dropped rows."""

    def __init__(self) -> None:
        super().__init__()
        self.core = _CombineCore()

    def construct(
        self, slots_QD: Tensor, weight_A: Tensor, row_of_slot_Q: Tensor, slot_of_row_A: Tensor
    ) -> Tensor:
        return self.core(slots_QD, weight_A, row_of_slot_Q, slot_of_row_A)[0]


class _CombineCore(nn.Cell):
    """Also returns what its gradient needs: the rows before scaling, and the weights spread over
    the features.
    """

    def construct(
        self, slots_QD: Tensor, weight_A: Tensor, row_of_slot_Q: Tensor, slot_of_row_A: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        rows_AD = _rows(slots_QD, slot_of_row_A)
        # A same-shape product is 2 to 3 times faster on the CPU than a broadcast one.
        weight_AD = ops.tile(ops.expand_dims(weight_A, 1), (1, slots_QD.shape[1]))
        return rows_AD * weight_AD, rows_AD, weight_AD

    def bprop(
        self,
        slots_QD: Tensor,
        weight_A: Tensor,
        row_of_slot_Q: Tensor,
        slot_of_row_A: Tensor,
        out: Any,
        grads: Any,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        rows_AD = out[1]
        weight_AD = out[2]
        grad_AD = grads[0]
        slots_grad_QD = _rows(grad_AD * weight_AD, row_of_slot_Q)
        # In fp32: a product may be beyond fp16 where the sum is not.
        weight_grad_A = ops.reduce_sum(
            ops.cast(grad_AD, ms.float32) * ops.cast(rows_AD, ms.float32), 1
        )
        return (
            slots_grad_QD,
            ops.cast(weight_grad_A, weight_A.dtype),
            ops.zeros_like(row_of_slot_Q),
            ops.zeros_like(slot_of_row_A),
        )


def _rows(x_MD: Tensor, one_based: Tensor) -> Tensor:
    zero_1D = ops.Zeros()((1, x_MD.shape[1]), x_MD.dtype)
    return ops.Gather()(ops.Concat(0)((zero_1D, x_MD)), one_based, 0)
