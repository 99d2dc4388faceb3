"""The two gates: a learned dense one (Switch) and LocMoE's grouped average pooling (GrAP).

Letters: T tokens, D hidden, E experts.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np
from mindspore import Tensor, nn, ops


def dense_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """G_i = w_i . x, fp32 [T, E]."""
    return ops.MatMul(transpose_b=True)(x_TD, w_ED)


def dense_cosine(x_TD: Tensor, w_ED: Tensor, logits_TE: Tensor, expert_T: Tensor) -> Tensor:
    """Cosine between each token and the dense gate of its expert, fp32 [T]."""
    chosen_T = chosen(logits_TE, expert_T)
    norms_E = ops.sqrt(ops.reduce_sum(w_ED * w_ED, 1))
    return chosen_T / (ops.gather(norms_E, expert_T, 0) * _norms(x_TD) + 1e-12)


def grap_weights(hidden_size: int, num_experts: int) -> np.ndarray:
    """The gate vectors w_i of GrAP, fp32 [E, D] (LocMoE): E/D on the i-th contiguous block of D/E
    features, else 0.

    They are orthogonal and all of norm sqrt(E/D).
    """
    block = hidden_size // num_experts
    return (np.kron(np.eye(num_experts), np.ones(block)) / block).astype(np.float32)


class GroupedAveragePooling(nn.Cell):
    """GrAP: the mean of each of E contiguous blocks of D/E features, x_TD -> [T, E] (LocMoE).

    On a CPU the mean is as fast as a dense gate's product on a 2-D view, and several times slower
    on a 3-D one.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.mean = ops.ReduceMean()
        self.tile = ops.Tile()

    def construct(self, x_TD: Tensor) -> Tensor:
        tokens, width = x_TD.shape
        return self.mean(x_TD.reshape(-1, width // self.num_experts), -1).reshape(
            tokens, self.num_experts
        )

    def bprop(self, x_TD: Tensor, out: Tensor, dout: Tensor) -> Tuple[Tensor]:
        tokens, width = x_TD.shape
        size = width // self.num_experts
        return (self.tile((dout * (1.0 / size)).reshape(-1, 1), (1, size)).reshape(tokens, width),)


def grap_cosine(x_TD: Tensor, logits_TE: Tensor, expert_T: Tensor, factor: float) -> Tensor:
    """Cosine between each token and the GrAP vector of its expert, fp32 [T].

    Args:
        x_TD, logits_TE, expert_T: the gate's input, its logits, the chosen experts.
        factor: what the logits are of w.x / |w|: their scale times the norm sqrt(E/D) of a gate
            vector.
    """
    return chosen(logits_TE, expert_T) / (_norms(x_TD) * factor + 1e-12)


def chosen(logits_TE: Tensor, expert_T: Tensor) -> Tensor:
    """Each token's logit of its expert, fp32 [T]."""
    return ops.squeeze(ops.gather_elements(logits_TE, 1, ops.expand_dims(expert_T, 1)), 1)


def scaled_to_norm(x_TD: Tensor, norm: float) -> Tensor:
    """Each row scaled to this norm, so that logits are cosines but for a constant; a row of
    zeros stays.
    """
    squares_T1 = ops.ReduceSum(keep_dims=True)(x_TD * x_TD, 1)
    return x_TD * (norm * ops.rsqrt(squares_T1 + 1e-12))


def _norms(x_TD: Tensor) -> Tensor:
    return ops.sqrt(ops.reduce_sum(x_TD * x_TD, 1))
