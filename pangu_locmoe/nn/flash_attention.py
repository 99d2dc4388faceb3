"""Flash attention, Ascend's fused operator, behind the interface of functional.Attention.

`train.fused` asks for it. It keeps no [S, S] probabilities for the backward pass and takes one byte
of mask for each pair of positions, shared by all heads. A model built where there is no Ascend has
the portable layers: the weights are the same.

It has never run: what is handed to the operator is tested, what it does with it is its
documentation's.

Letters: B batch, S sequence, H heads, D hidden: one head's part.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from pangu_locmoe.config import Config
from pangu_locmoe.nn.device import on_ascend


def used(config: Config) -> bool:
    """Whether a model built here has fused operators."""
    return config.train.fused and on_ascend()


def discard_mask(segments_BS: Tensor, causal_SS: Tensor) -> Tensor:
    """1 where a token may not look, 0 where it may, uint8 [B, 1, S, S]: the operator's convention,
    `attention_mask` reversed.

    Args:
        segments_BS: segment ids, int32.
        causal_SS: ones on and below the diagonal, fp32.
    """
    same_BSS = ops.cast(
        ops.equal(ops.expand_dims(segments_BS, 2), ops.expand_dims(segments_BS, 1)), causal_SS.dtype
    )
    return ops.cast(ops.expand_dims(1.0 - same_BSS * causal_SS, 1), ms.uint8)


class FlashAttention(nn.Cell):
    """softmax(q k^T, without what the mask discards) v for several heads; q is scaled already,
    so the operator's scale is 1.
    """

    def construct(
        self, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_B1SS: Tensor
    ) -> Tensor:
        """Attend.

        Args:
            q_BHSD: scaled queries, fp16 or bf16; D is a multiple of 16 up to 512.
            k_BHSD: keys.
            v_BHSD: values.
            mask_B1SS: of `discard_mask`.

        Returns:
            [B, H, S, D], in q's dtype.
        """
        # Sparse mode 0 reads the whole mask: a document's beginning is nowhere else.
        return ops.flash_attention_score(
            q_BHSD,
            k_BHSD,
            v_BHSD,
            q_BHSD.shape[1],
            attn_mask=mask_B1SS,
            scalar_value=1.0,
            input_layout="BNSD",
            sparse_mode=0,
        )
