"""The MoE layer's parts as Ascend's fused operators, for exchanges whose sizes follow the routing
(parallel.sizes: counts).

    token permute -> exchange -> grouped products, each expert its own number of rows -> exchange
    back -> token unpermute

With constant sizes every expert has as many slots, and one batched product is the same work:
nothing here is used then. None of it has run: what is handed to the operators is tested, what they
do with it is their documentation's.

Letters: A assignments, D hidden, F inner width, G local experts, M rows received, Q slots handed to
the grouped products.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import GroupedMatmul

from pangu_locmoe.moe.dispatch import Dispatch
from pangu_locmoe.moe.experts import Experts


class PermuteTokens(nn.Cell):
    """`dispatch.Dispatch` where every assignment has a position and every position an assignment."""

    def construct(
        self, x_AD: Tensor, assignment_of_position_A: Tensor, position_of_assignment_A: Tensor
    ) -> Tensor:
        # The operator sorts tokens by a number each; its position is such a number.
        return ops.moe_token_permute(x_AD, position_of_assignment_A - 1)[0]


class UnpermuteTokens(nn.Cell):
    """`dispatch.Combine` where every assignment has a position and every position an assignment."""

    def construct(
        self,
        rows_AD: Tensor,
        weight_A: Tensor,
        assignment_of_position_A: Tensor,
        position_of_assignment_A: Tensor,
    ) -> Tensor:
        return ops.moe_token_unpermute(
            rows_AD, position_of_assignment_A - 1, ops.expand_dims(weight_A, 1)
        )


def grouped_rows(
    slot_of_row_M: np.ndarray, slots: int, num_experts: int
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows by expert, without those that are dropped and with one zero row for each expert that
    has none.

    The operator does not work with an expert without rows, and its gradient would be missing.

    Args:
        slot_of_row_M: as `transport.counts.assign_slots` gives them: one-based, an expert's slots
            after another's; 0: dropped.
        slots: of each expert.
        num_experts: G.

    Returns:
        one-based rows int32 [Q], 0 for a zero row; one-based positions int32 [M], 0 for a dropped
        row; where each expert's rows end, int64 [G].
    """
    kept = np.flatnonzero(slot_of_row_M)
    expert_of_kept = (slot_of_row_M[kept] - 1) // slots
    empty = np.setdiff1d(np.arange(num_experts), expert_of_kept)
    expert_Q = np.concatenate([expert_of_kept, empty])
    order_Q = np.argsort(expert_Q, kind="stable")
    row_of_position_Q = np.concatenate([kept + 1, np.zeros(len(empty), np.int64)])[order_Q].astype(
        np.int32
    )
    position_of_row_M = np.zeros(len(slot_of_row_M) + 1, np.int32)
    position_of_row_M[row_of_position_Q] = np.arange(
        1, len(row_of_position_Q) + 1
    )  # zero rows all write the first number, which is cut off
    return (
        row_of_position_Q,
        position_of_row_M[1:],
        np.cumsum(np.bincount(expert_Q, minlength=num_experts)).astype(np.int64),
    )


def apply_grouped(
    experts: Experts, rows_MD: Tensor, slot_of_row_M: np.ndarray, slots: int
) -> Tensor:
    """GELU(x W_in) W_out of each row's expert, 0 for a dropped row; nothing is padded up to the
    fullest expert. PyNative.

    Args:
        experts: G of them.
        rows_MD: as they came.
        slot_of_row_M, slots: as for `grouped_rows`.
    """
    row_of_position_Q, position_of_row_M, ends_G = grouped_rows(
        slot_of_row_M, slots, experts.w_in.shape[0]
    )
    row_of_position = Tensor(row_of_position_Q)
    position_of_row = Tensor(position_of_row_M)
    ends = Tensor(ends_G)
    move = Dispatch()  # one tensor in, one out; groups of rows
    product = GroupedMatmul(split_item=3, group_type=0)
    w_in = ops.cast(experts.w_in, rows_MD.dtype)
    w_out = ops.cast(experts.w_out, rows_MD.dtype)
    x_QD = experts.enter(move(rows_MD, row_of_position, position_of_row))
    inner_QF = experts.gelu(product([x_QD], [w_in], None, None, None, None, None, ends)[0])
    y_QD = experts.leave(product([inner_QF], [w_out], None, None, None, None, None, ends)[0])
    return move(y_QD, position_of_row, row_of_position)
