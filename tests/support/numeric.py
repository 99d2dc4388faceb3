"""Float64 references in NumPy, finite differences, and the gradients of cells, for the tests of
model and moe.
"""

from __future__ import annotations

import math
from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


class Probe(nn.Cell):
    """Gradients of a cell with respect to all inputs and, when it has any, its parameters."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__()
        self.cell = cell
        self.weights = ms.ParameterTuple(cell.trainable_params())
        self.by_list = len(self.weights) > 0
        self.gradient = ops.GradOperation(get_all=True, get_by_list=self.by_list, sens_param=True)

    def construct(self, *arguments):
        if self.by_list:
            return self.gradient(self.cell, self.weights)(*arguments)
        return self.gradient(self.cell)(*arguments)


class LayerObjective(nn.Cell):
    """Something that every output of an MoE layer feeds: (x_TD, tokens_T, domains_T) -> a
    scalar.
    """

    def __init__(self, layer: nn.Cell, capacity: int, sens_TD: np.ndarray) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer
        self.capacity = capacity
        self.sens_TD = tensor(sens_TD)
        self.keys = no_noise(*sens_TD.shape)

    def construct(self, x_TD, tokens_T, domains_T):
        y_TD, stats = self.layer(x_TD, tokens_T, domains_T, self.keys, self.capacity, True)
        return (
            ops.reduce_sum(y_TD * self.sens_TD)
            + stats["balance_loss"]
            + stats["locality_loss"]
            + stats["z_loss"]
        )


def tensor(array: Any) -> Tensor:
    return Tensor(np.asarray(array, np.float32))


def integers(array: Any) -> Tensor:
    return Tensor(np.asarray(array, np.int32))


def close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    """Relative to each number, and to the largest one for those near zero."""
    got = got.asnumpy() if isinstance(got, Tensor) else got
    np.testing.assert_allclose(
        got, wanted, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(wanted).max()))
    )


def slope(
    function: Callable[[np.ndarray], Any], x: np.ndarray, sens: Any = 1.0, h: float = 1e-5
) -> np.ndarray:
    """Central differences of sum(sens * function(x)) in float64."""
    grad = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up = x.copy()
        down = x.copy()
        up[index] += h
        down[index] -= h
        grad[index] = np.sum((function(up) - function(down)) * sens) / (2 * h)
    return grad


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return gamma * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + beta


def no_noise(tokens: int, features: int) -> tuple[Tensor, Tensor]:
    """Keys for a place that draws nothing."""
    return integers(np.zeros(tokens)), integers(np.zeros(features))
