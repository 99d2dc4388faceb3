"""The experts: E feed-forward networks applied to groups of tokens at once.

Letters: E experts, G groups, C slots in a group, D hidden, F inner width.
"""

from __future__ import annotations

from typing import Iterable, Optional, Tuple

import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.config import Config
from pangu_locmoe.nn.functional import Gelu
from pangu_locmoe.nn.init import normal
from pangu_locmoe.parallel.tensor import Cut, TensorGroup


class Experts(nn.Cell):
    """y = GELU(x W_in) W_out for each group's expert; LocMoE's formula, without biases.

    Args:
        w_in_EDF, w_out_EFD: initial weights, fp32.
        tensor: the ranks among which the inner width is divided.
    """

    def __init__(self, w_in_EDF: np.ndarray, w_out_EFD: np.ndarray, tensor: TensorGroup) -> None:
        super().__init__()
        self.w_in = tensor.parameter(w_in_EDF, "w_in", Cut(2))
        self.w_out = tensor.parameter(w_out_EFD, "w_out", Cut(1))
        self.enter = tensor.enter
        self.leave = tensor.leave
        self.matmul = ops.BatchMatMul()
        self.gelu = Gelu()

    def construct(self, x_GCD: Tensor, expert_of_group_G: Optional[Tensor]) -> Tensor:
        """Apply experts.

        Args:
            x_GCD: tokens in their slots, zero in empty ones (which stay zero).
            expert_of_group_G: whose each group is, int32; None: group i is expert i's.
        """
        w_in = ops.cast(self.w_in, x_GCD.dtype)
        w_out = ops.cast(self.w_out, x_GCD.dtype)
        if expert_of_group_G is not None:
            w_in, w_out = (
                ops.gather(w_in, expert_of_group_G, 0),
                ops.gather(w_out, expert_of_group_G, 0),
            )
        return self.leave(self.matmul(self.gelu(self.matmul(self.enter(x_GCD), w_in)), w_out))


def expert_weights(
    config: Config, layer: int, experts: Iterable[int]
) -> Tuple[np.ndarray, np.ndarray]:
    """Initial weights fp32 [E, D, F] and [E, F, D].

    Those of one expert depend on its global id only, not on who holds it.

    Args:
        config: the run.
        layer: index among the MoE layers.
        experts: which, in order.
    """
    model = config.model
    w_in_DF = (model.hidden_size, model.ffn_size)
    w_out_FD = (model.ffn_size, model.hidden_size)
    out_std = model.init_std / (2 * model.num_layers) ** 0.5
    seeds = [[config.train.seed, 3, layer, int(expert)] for expert in experts]
    w_in_EDF = np.stack([normal([*seed, 0], w_in_DF, model.init_std) for seed in seeds])
    w_out_EFD = np.stack([normal([*seed, 1], w_out_FD, out_std) for seed in seeds])
    return w_in_EDF, w_out_EFD
