"""The forms of the usual layers that are fast on the CPU and still made of ops that Ascend has.

On Ascend LayerNorm and GELU are one operator each, forward and backward. Every launch costs there,
and recomputation saves nothing of a Cell with a hand-made gradient: it keeps all that it returns.

MindSpore's own gradients of LayerNorm, softmax, bias and gather run 2-8 times slower on the CPU
than they need to: they reduce and broadcast in single-threaded kernels. The Cells here carry a
hand-made ``bprop`` whose rules of thumb, all measured on two cores with tensors of [1024,
256..1024] float32, are:

- same-shape arithmetic is cheap (0.13 ms on [1024, 256]); a broadcast operand costs 2-3 times as
  much, so a column or a row is spread first, by Tile or by an outer product (MatMul with an inner
  dimension of 1), whose kernels are vectorised;
- ReduceSum or ReduceMean over the last axis of a 2-D tensor, and ReduceSum over the first, are
  fast; BiasAddGrad is 6 times slower than ReduceSum; reductions of 3-D and 4-D tensors are slow;
- the gradient of a gather by a one-to-one map is a gather too, never a scatter.

What a bprop needs of the forward is returned as an extra output, so that PyNative computes it once
as well; the public Cells hide the extra outputs.

fp16 comes in and goes out, and everything between is float32: a square overflows fp16 from 256 on,
a product of two rows sooner, and where the result would be finite an infinity on the way to it
becomes 0 * inf. What is kept for the backward pass is fp16, but for GELU's sigmoid and attention's
result, from which nearly equal numbers are subtracted.

Shapes: T tokens, D hidden, F ffn, E experts, C capacity, V vocabulary, B batch, H heads, S queries,
K keys, d head width.
"""

from __future__ import annotations

import math
from typing import Any, Tuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

from pangu_locmoe.nn.device import on_ascend

_GELU_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
_GELU_CUBE = 0.044715


class _LayerNormCore(nn.Cell):
    """(x_TD, gamma_D, beta_D) -> (y_TD, centred_TD, inverse_deviation_T1), all float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.width = width
        self.epsilon = epsilon
        self.mean = ops.ReduceMean(keep_dims=True)
        self.sum = ops.ReduceSum()
        self.tile = ops.Tile()
        self.matmul = ops.MatMul()
        self.rsqrt = ops.Rsqrt()
        self.square = ops.Square()
        self.bias_add = ops.BiasAdd()

    def construct(
        self, x_TD: Tensor, gamma_D: Tensor, beta_D: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        centred_TD = x_TD - self.tile(self.mean(x_TD, -1), (1, self.width))
        inverse_T1 = self.rsqrt(self.mean(self.square(centred_TD), -1) + self.epsilon)
        scale_TD = self.matmul(inverse_T1, gamma_D.reshape(1, -1))
        return self.bias_add(centred_TD * scale_TD, beta_D), centred_TD, inverse_T1

    def bprop(
        self, x_TD: Tensor, gamma_D: Tensor, beta_D: Tensor, out: Any, dout: Any
    ) -> Tuple[Tensor, Tensor, Tensor]:
        centred_TD = out[1]
        inverse_T1 = out[2]
        dy_TD = dout[0]
        scaled_TD = dy_TD * self.matmul(inverse_T1, gamma_D.reshape(1, -1))
        dgamma_D = self.matmul(inverse_T1.reshape(1, -1), dy_TD * centred_TD).reshape(-1)
        dbeta_D = self.sum(dy_TD, 0)
        mean_TD = self.tile(self.mean(scaled_TD, -1), (1, self.width))
        slope_T1 = self.mean(scaled_TD * centred_TD, -1) * self.square(inverse_T1)
        dx_TD = scaled_TD - (centred_TD * self.tile(slope_T1, (1, self.width)) + mean_TD)
        return dx_TD, dgamma_D, dbeta_D


class LayerNorm(nn.Cell):
    """Normalise the last axis: y = gamma * (x - mean) / sqrt(variance + epsilon) + beta.

    Forward with gradients takes 0.65 ms on [1024, 256] where nn.LayerNorm takes 4.3. Computes in
    float32 and returns x's dtype.

    Args:
        width: size D of the last axis.
        epsilon: added to the variance.
    """

    def __init__(self, width: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.width = width
        self.epsilon = epsilon
        self.gamma = Parameter(Tensor(np.ones(width, np.float32)), name="gamma")
        self.beta = Parameter(Tensor(np.zeros(width, np.float32)), name="beta")
        self.core = _LayerNormCore(width, epsilon)
        self.one_operator = on_ascend()

    def construct(self, x: Tensor) -> Tensor:
        """x [..., D] of any float dtype -> the same shape and dtype."""
        x_TD = x.reshape(-1, self.width).astype(ms.float32)
        if self.one_operator:
            y_TD = mint.nn.functional.layer_norm(
                x_TD, (self.width,), self.gamma, self.beta, self.epsilon
            )
            return y_TD.reshape(x.shape).astype(x.dtype)
        return self.core(x_TD, self.gamma, self.beta)[0].reshape(x.shape).astype(x.dtype)


class _AttentionCore(nn.Cell):
    """(q_BHSD, k_BHXD, v_BHXD, mask) -> (o_BHSD, p_BHSX in v's dtype); q is scaled already.

    With `again` set, v is returned in p's place, and the gradient computes p again.

    A CPU's products are in float32, and so is o. Ascend's matrix unit takes half precision and adds
    up in float32; what it writes is half again, so that scores beyond fp16 are infinite there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide = not on_ascend()
        self.again = False
        self.matmul = ops.BatchMatMul()
        self.matmul_bt = ops.BatchMatMul(transpose_b=True)
        self.matmul_at = ops.BatchMatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)
        self.sum = ops.ReduceSum(keep_dims=True)
        self.concat = ops.Concat(-1)
        self.ones_like = ops.OnesLike()
        self.zeros_like = ops.ZerosLike()

    def construct(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tuple[Tensor, Tensor]:
        p = self._probabilities(q, k, mask)
        kept = p.astype(v.dtype)
        o = self.matmul(p if self.wide else kept, self._enter(v))
        return o, v if self.again else kept

    def bprop(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Any, dout: Any
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        v_in = self._enter(v)
        o = out[0]
        do = dout[0]
        kept = out[1]
        if self.again:
            # Not before the gradient is there: a compiler would take the forward pass's, and keep it.
            kept = self._probabilities(ops.depend(q, do), k, mask).astype(v.dtype)
        p = self._enter(kept)
        # Softmax's gradient is p * (dp - sum_X(p * dp)). The row sum equals sum_D(o * do), which is
        # X/D times smaller, and its subtraction rides in the matrix product as one more column: two
        # passes over [B, H, S, X] less.
        rows = (*do.shape[:-1], 1)
        correction = (
            self.sum((_wide(do) * _wide(o)).reshape(-1, o.shape[-1]), -1)
            .reshape(rows)
            .astype(do.dtype)
        )
        dp = self.matmul_bt(
            self.concat((do, -correction)), self.concat((v_in, self.ones_like(v_in[..., :1])))
        )
        ds = p * dp
        dq = self.matmul(ds, self._enter(k))
        dk = self.matmul_at(ds, self._enter(q))
        dv = self.matmul_at(p, do)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), self.zeros_like(mask)

    def _probabilities(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return self.softmax(_wide(self.matmul_bt(self._enter(q), self._enter(k))) + mask)

    def _enter(self, x: Tensor) -> Tensor:
        return _wide(x) if self.wide else x


def _wide(x: Tensor) -> Tensor:
    return x.astype(ms.float32)


class Attention(nn.Cell):
    """softmax(q k^T + mask) v for several heads, with the gradient of FlashAttention's paper
    written as plain matrix products.

    Scale q by 1/sqrt(d) before the call: it is K/d times smaller than the scores. On a CPU
    everything inside runs in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.core = _AttentionCore()

    def keep_no_probabilities(self) -> None:
        """Compute them again for the gradient. `recompute()` of a Cell around this one does not see
        to it: what a Cell with a hand-made gradient returns is kept.
        """
        self.core.again = True

    def construct(self, q_BHSD: Tensor, k_BHXD: Tensor, v_BHXD: Tensor, mask: Tensor) -> Tensor:
        """Attend.

        Args:
            q_BHSD: scaled queries.
            k_BHXD: keys.
            v_BHXD: values.
            mask: float32, added to the scores: 0 where attending is allowed and very negative where
                not. [B, H, S, X] is fastest (a smaller one is broadcast, 2 times slower); it gets
                no gradient.

        Returns:
            [B, H, S, D], in v's dtype.
        """
        return self.core(q_BHSD, k_BHXD, v_BHXD, mask)[0].astype(v_BHXD.dtype)


class _GeluCore(nn.Cell):
    """x -> (gelu(x), sigmoid): the tanh form, as x * sigmoid(2u) with u = sqrt(2/pi) (x +
    0.044715 x^3).
    """

    def __init__(self) -> None:
        super().__init__()
        self.square = ops.Square()
        self.sigmoid = ops.Sigmoid()

    def construct(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        wide = _wide(x)
        s = self.sigmoid(wide * (self.square(wide) * (_GELU_SLOPE * _GELU_CUBE) + _GELU_SLOPE))
        return (wide * s).astype(x.dtype), s

    def bprop(self, x: Tensor, out: Any, dout: Any) -> Tuple[Tensor]:
        y = _wide(out[0])
        s = out[1]
        slope = self.square(_wide(x)) * (3.0 * _GELU_SLOPE * _GELU_CUBE) + _GELU_SLOPE
        return ((_wide(dout[0]) * (s + (y - y * s) * slope)).astype(x.dtype),)


class Gelu(nn.Cell):
    """GELU, tanh form.

    6 to 13 times faster than ops.GeLU; by Sigmoid because the CPU's Tanh kernel is only good to
    2e-4.
    """

    def __init__(self) -> None:
        super().__init__()
        self.core = _GeluCore()
        self.one_operator = on_ascend()

    def construct(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if self.one_operator:
            return mint.nn.functional.gelu(x, approximate="tanh")
        return self.core(x)[0]


class _CrossEntropy(nn.Cell):
    """Mean loss as (log sum exp - peak) + (peak - target): the kernel alone says inf where a
    target's probability underflows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.argmax = ops.ArgMaxWithValue(-1)
        self.mean = ops.ReduceMean()
        self.kernel = ops.SparseSoftmaxCrossEntropyWithLogits()
        self.kernel_gradient = ops.SparseSoftmaxCrossEntropyWithLogits(is_grad=True)

    def construct(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        likeliest_T, peak_T = self.argmax(logits_TV)
        target_T = ops.gather_elements(logits_TV, 1, targets_T.reshape(-1, 1)).reshape(-1)
        return self.kernel(logits_TV, likeliest_T.astype(ms.int32)) + self.mean(peak_T - target_T)

    def bprop(
        self, logits_TV: Tensor, targets_T: Tensor, out: Tensor, dout: Tensor
    ) -> Tuple[Tensor, Tensor]:
        return self.kernel_gradient(logits_TV, targets_T) * dout, ops.zeros_like(targets_T)


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Mean next-token loss, a float32 scalar; 10 times faster than ops.cross_entropy.

    Args:
        logits_TV: float32.
        targets_T: int32.
    """
    return _CrossEntropy()(logits_TV, targets_T)


def token_losses(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Each token's loss, float32 [T], for evaluation (its gradient works but is slow).

    Args:
        logits_TV: float32.
        targets_T: int32.
    """
    return -ops.gather_elements(
        ops.log_softmax(logits_TV, -1), 1, targets_T.reshape(-1, 1)
    ).reshape(-1)
