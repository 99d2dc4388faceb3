"""What runs over the vocabulary: the embedding of tokens, and the loss of logits.

A tensor-parallel group divides its rows.

Letters: T tokens, D hidden, V vocabulary (this rank's rows of it; all without tensor parallelism),
R ranks of the replica, B prompts.
"""

from __future__ import annotations

from typing import Any, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.nn import functional
from pangu_locmoe.parallel.tensor import TensorGroup


class Vocabulary(nn.Cell):
    """The rank's rows of the vocabulary, vocab_size / R, from that times its position on.

    Args:
        vocab_size: V.
        tensor: the ranks that divide it.
    """

    def __init__(self, vocab_size: int, tensor: TensorGroup) -> None:
        super().__init__()
        self.width = vocab_size // tensor.size
        self.divided = tensor.size > 1
        self.first = self.width * tensor.position
        self.leave = tensor.leave_rows
        if self.divided:
            self.losses = _DividedLosses(self.width, tensor)
            self.sum = tensor.sum
            self.mine_1R1 = Tensor(
                (np.arange(tensor.size) == tensor.position).astype(np.float32).reshape(1, -1, 1)
            )

    def embed(self, table_VD: Tensor, tokens_T: Tensor, domains_T: Tensor) -> Tensor:
        """Embeddings [T, D] from this rank's part of the table, whose domains have V rows each;
        int32 ids.

        Each token is on one rank; the others add zero. With sequence parallelism, of this rank's
        tokens.
        """
        if not self.divided:
            return ops.gather(table_VD, domains_T * self.width + tokens_T, 0)
        local_T = tokens_T - self.first
        inside_T = ops.cast(
            ops.logical_and(ops.greater_equal(local_T, 0), ops.less(local_T, self.width)), ms.int32
        )
        rows_TD = ops.gather(table_VD, domains_T * self.width + local_T * inside_T, 0)
        return self.leave(rows_TD * ops.expand_dims(ops.cast(inside_T, rows_TD.dtype), 1))

    def cross_entropy(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        """Mean next-token loss, an fp32 scalar, the same on all ranks of the replica. fp32 logits,
        int32 targets.
        """
        if not self.divided:
            return functional.cross_entropy(logits_TV, targets_T)
        return ops.reduce_sum(self.losses(logits_TV, targets_T)) * (1.0 / targets_T.shape[0])

    def token_losses(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        """Each token's loss, fp32 [T]."""
        if not self.divided:
            return functional.token_losses(logits_TV, targets_T)
        return self.losses(logits_TV, targets_T)

    def whole(self, logits_BV: Tensor) -> Tensor:
        """All logits, fp32 [B, V], on every rank. No gradient."""
        if not self.divided:
            return logits_BV
        return ops.reshape(
            self.sum(ops.expand_dims(logits_BV, 1) * self.mine_1R1), (logits_BV.shape[0], -1)
        )


class _DividedLosses(nn.Cell):
    """-log softmax(logits)[target] of each token, from the logits of all ranks (Megatron-LM's
    vocabulary-parallel loss).
    """

    def __init__(self, width: int, tensor: TensorGroup) -> None:
        super().__init__()
        self.core = _DividedLossesCore(width, tensor)

    def construct(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        return self.core(logits_TV, targets_T)[0]


class _DividedLossesCore(nn.Cell):
    """Also returns what its gradient needs: this rank's probabilities, and ones where a target
    is.
    """

    def __init__(self, width: int, tensor: TensorGroup) -> None:
        super().__init__()
        self.width = width
        self.sum = tensor.sum
        self.first = width * tensor.position
        self.rows_V = Tensor(np.arange(width, dtype=np.int32))
        self.mine_R1 = Tensor(
            (np.arange(tensor.size) == tensor.position).astype(np.float32).reshape(-1, 1)
        )
        self.max = ops.ReduceMax()
        self.add = ops.ReduceSum()
        self.tile = ops.Tile()
        self.expand = ops.ExpandDims()

    def construct(self, logits_TV: Tensor, targets_T: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        hot_TV = ops.cast(
            ops.equal(self.expand(targets_T - self.first, 1), self.rows_V), ms.float32
        )
        # MCCL only adds up, so that the largest logit of all ranks is found by gathering theirs.
        peak_T = self.max(self.sum(self.mine_R1 * self.expand(self.max(logits_TV, 1), 0)), 0)
        shifted_TV = logits_TV - self._over_width(peak_T)
        powers_TV = ops.exp(shifted_TV)
        sums_2T = self.sum(ops.stack((self.add(powers_TV, 1), self.add(shifted_TV * hot_TV, 1))))
        return (
            ops.log(sums_2T[0]) - sums_2T[1],
            powers_TV * self._over_width(1.0 / sums_2T[0]),
            hot_TV,
        )

    def bprop(
        self, logits_TV: Tensor, targets_T: Tensor, out: Any, grads: Any
    ) -> Tuple[Tensor, Tensor]:
        return (out[1] - out[2]) * self._over_width(grads[0]), ops.zeros_like(targets_T)

    def _over_width(self, x_T: Tensor) -> Tensor:
        return self.tile(self.expand(x_T, 1), (1, self.width))
