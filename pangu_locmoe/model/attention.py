"""Multi-head attention with an additive mask.

Letters: B batch, S sequence, T = B*S tokens, D hidden, or one head's part of it, H heads.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.config import ModelConfig
from pangu_locmoe.nn import functional
from pangu_locmoe.nn.init import normal
from pangu_locmoe.parallel.tensor import Cut, TensorGroup


def attention_mask(segments_BS: Tensor, causal_SS: Tensor, num_heads: int) -> Tensor:
    """0 where a token may look, -3e38 elsewhere, below any score, fp32 [B, H, S, S]: only back, and
    only inside its own segment.

    Spread over the heads once, because adding a mask of the scores' own shape is twice as fast in
    every layer.

    Args:
        segments_BS: segment ids, int32.
        causal_SS: ones on and below the diagonal, fp32.
        num_heads: H.
    """
    same_BSS = ops.cast(
        ops.equal(ops.expand_dims(segments_BS, 2), ops.expand_dims(segments_BS, 1)), causal_SS.dtype
    )
    return ops.tile(ops.expand_dims((same_BSS * causal_SS - 1.0) * 3e38, 1), (1, num_heads, 1, 1))


class Attention(nn.Cell):
    """softmax(Q K^T / sqrt(d) + mask) V, projected.

    Queries come from `query_TD`, keys and values from `x_TD`.

    A tensor-parallel group divides the heads; its ranks' inputs have entered the group. Batch and
    length are the mask's.
    """

    def __init__(self, config: ModelConfig, seed: list[int], tensor: TensorGroup) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.num_heads = config.num_heads // tensor.size
        self.head_size = hidden_size // config.num_heads
        self.w_query = tensor.parameter(
            normal([*seed, 0], (hidden_size, hidden_size), config.init_std), "w_query", Cut(1)
        )
        self.w_key_value = tensor.parameter(
            normal([*seed, 1], (hidden_size, 2 * hidden_size), config.init_std),
            "w_key_value",
            Cut(1, 2),
        )
        out_std = config.init_std / np.sqrt(2 * config.num_layers)
        self.w_out = tensor.parameter(
            normal([*seed, 2], (hidden_size, hidden_size), float(out_std)), "w_out", Cut(0)
        )
        self.leave = tensor.leave_rows
        # The primitive: the gradient of ops.matmul transposes its operands, 3% of a step.
        self.matmul = ops.MatMul()
        self.attend = functional.Attention()

    def construct(self, query_TD: Tensor, x_TD: Tensor, mask_BHSS: Tensor) -> Tensor:
        query_BHSD, key_BHSD, value_BHSD = self.heads(query_TD, x_TD, mask_BHSS.shape[0])
        return self.joined(self.attend(query_BHSD, key_BHSD, value_BHSD, mask_BHSS))

    def heads(self, query_TD: Tensor, x_TD: Tensor, batch: int) -> Tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, keys and values of each head, [B, H, S, D]; there may be fewer queries."""
        # Scaling W is one pass over [D, D] instead of one over [B, H, S, S], and Q before scaling
        # may be beyond fp16.
        query_TD = self.matmul(
            query_TD, ops.cast(self.w_query * (self.head_size**-0.5), x_TD.dtype)
        )
        key_TD, value_TD = ops.split(
            self.matmul(x_TD, ops.cast(self.w_key_value, x_TD.dtype)),
            self.num_heads * self.head_size,
            1,
        )
        apart = (batch, -1, self.num_heads, self.head_size)
        return (
            ops.transpose(ops.reshape(query_TD, apart), (0, 2, 1, 3)),
            ops.transpose(ops.reshape(key_TD, apart), (0, 2, 1, 3)),
            ops.transpose(ops.reshape(value_TD, apart), (0, 2, 1, 3)),
        )

    def joined(self, mixed_BHSD: Tensor) -> Tensor:
        """What the heads found, projected, [T, D]."""
        width = self.num_heads * self.head_size
        mixed_TD = ops.reshape(ops.transpose(mixed_BHSD, (0, 2, 1, 3)), (-1, width))
        return self.leave(self.matmul(mixed_TD, ops.cast(self.w_out, mixed_TD.dtype)))
