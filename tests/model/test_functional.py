"""The fast forms against float64 NumPy, forward and gradient, in both execution modes."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from pangu_locmoe.model import functional as fn

RANDOM = np.random.default_rng(7)


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


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"], autouse=True)
def mode(request):
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=before)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape)


def tensor(array: np.ndarray) -> Tensor:
    return Tensor(np.asarray(array, np.float32))


def integers(array) -> Tensor:
    return Tensor(np.asarray(array, np.int32))


def close(got: Tensor, wanted: np.ndarray, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(got.asnumpy(), wanted, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(wanted).max())))


def slope(function, x: np.ndarray, sens: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Central differences of sum(sens * function(x)) in float64."""
    grad = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += h
        down[index] -= h
        grad[index] = ((function(up) - function(down)) * sens).sum() / (2 * h)
    return grad


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return gamma * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + beta


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["centred", "far from zero"])
def test_layer_norm_and_its_gradient(offset):
    x, sens, gamma, beta = normal(6, 16) + offset, normal(6, 16), normal(16), normal(16)
    norm = fn.LayerNorm(16)
    assert [p.name for p in norm.trainable_params()] == ["gamma", "beta"]
    norm.gamma.set_data(tensor(gamma))
    norm.beta.set_data(tensor(beta))
    tolerance = 2e-5 if offset == 0 else 2e-4
    close(norm(tensor(x)), layer_norm(x, gamma, beta), tolerance)
    (dx,), (dgamma, dbeta) = Probe(norm)(tensor(x), tensor(sens))
    close(dx, slope(lambda v: layer_norm(v, gamma, beta), x, sens), tolerance)
    close(dgamma, slope(lambda v: layer_norm(x, v, beta), gamma, sens), tolerance)
    close(dbeta, sens.sum(0), tolerance)


def test_layer_norm_keeps_shape_and_dtype():
    x = Tensor(normal(2, 3, 16).astype(np.float16))
    y = fn.LayerNorm(16)(x)
    assert y.shape == (2, 3, 16)
    assert y.dtype == ms.float16


def test_attention_and_its_gradients():
    batch, heads, queries, keys, width = 2, 2, 4, 5, 3
    q, k, v = normal(batch, heads, queries, width), normal(batch, heads, keys, width), normal(batch, heads, keys, width)
    sens = normal(batch, heads, queries, width)
    mask = np.where(np.arange(keys) > np.arange(queries)[:, None] + 1, -1e9, 0.0)
    full = np.broadcast_to(mask, (batch, heads, queries, keys))

    def attend(q, k, v):
        return softmax(q @ k.swapaxes(-1, -2) + mask) @ v

    cell = fn.Attention()
    close(cell(tensor(q), tensor(k), tensor(v), tensor(full)), attend(q, k, v))
    dq, dk, dv, dmask = Probe(cell)(tensor(q), tensor(k), tensor(v), tensor(full), tensor(sens))
    close(dq, slope(lambda x: attend(x, k, v), q, sens))
    close(dk, slope(lambda x: attend(q, x, v), k, sens))
    close(dv, slope(lambda x: attend(q, k, x), v, sens))
    assert not dmask.asnumpy().any()
    close(cell(tensor(q), tensor(k), tensor(v), tensor(mask)), attend(q, k, v))


def test_causal_mask():
    mask = fn.causal_mask(2, 3, 4).asnumpy()
    assert mask.shape == (2, 3, 4, 4)
    np.testing.assert_array_equal(mask[1, 2] == 0, np.tril(np.ones((4, 4), bool)))


def test_gelu_and_its_gradient():
    x, sens = np.linspace(-12, 12, 60).reshape(4, 15), normal(4, 15)
    close(fn.Gelu()(tensor(x)), gelu(x), 2e-6)
    close(Probe(fn.Gelu())(tensor(x), tensor(sens))[0], slope(gelu, x, sens), 5e-6)


def test_bias_add_and_its_gradients():
    x, b, sens = normal(5, 8), normal(8), normal(5, 8)
    close(fn.BiasAdd()(tensor(x), tensor(b)), x + b)
    dx, db = Probe(fn.BiasAdd())(tensor(x), tensor(b), tensor(sens))
    close(dx, sens)
    close(db, sens.sum(0))


def test_expert_bias_add_and_its_gradients():
    x, b, sens = normal(3, 5, 8), normal(3, 8), normal(3, 5, 8)
    close(fn.ExpertBiasAdd()(tensor(x), tensor(b)), x + b[:, None])
    dx, db = Probe(fn.ExpertBiasAdd())(tensor(x), tensor(b), tensor(sens))
    close(dx, sens)
    close(db, sens.sum(1))


def test_group_mean_and_its_gradient():
    x, sens = normal(5, 12), normal(5, 3)
    close(fn.GroupMean(3)(tensor(x)), x.reshape(5, 3, 4).mean(-1))
    close(Probe(fn.GroupMean(3))(tensor(x), tensor(sens))[0], np.repeat(sens / 4, 4, axis=1))


# five tokens, two experts of two slots; token 3 is dropped, slot 3 (expert 1, second place) is empty
TOKEN_OF_SLOT = np.array([3, 1, 2, 0])
SLOT_OF_TOKEN = np.array([2, 3, 1, 0, 0])


def test_dispatch_and_its_gradient():
    x, sens = normal(5, 4), normal(4, 4)
    padded = np.concatenate([np.zeros((1, 4)), x])
    maps = integers(TOKEN_OF_SLOT), integers(SLOT_OF_TOKEN)
    close(fn.Dispatch()(tensor(x), *maps), padded[TOKEN_OF_SLOT])
    dx = Probe(fn.Dispatch())(tensor(x), *maps, tensor(sens))[0]
    close(dx, slope(lambda v: np.concatenate([np.zeros((1, 4)), v])[TOKEN_OF_SLOT], x, sens))


def test_combine_and_its_gradients():
    slots, weight, sens = normal(4, 6), normal(5), normal(5, 6)
    maps = integers(TOKEN_OF_SLOT), integers(SLOT_OF_TOKEN)

    def combine(slots, weight):
        return weight[:, None] * np.concatenate([np.zeros((1, 6)), slots])[SLOT_OF_TOKEN]

    close(fn.Combine()(tensor(slots), tensor(weight), *maps), combine(slots, weight))
    dslots, dweight = Probe(fn.Combine())(tensor(slots), tensor(weight), *maps, tensor(sens))[:2]
    close(dslots, slope(lambda v: combine(v, weight), slots, sens))
    close(dweight, slope(lambda v: combine(slots, v), weight, sens))


class Positions(nn.Cell):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def construct(self, expert_T, priority_T):
        return fn.queue_positions(expert_T, priority_T, self.experts), fn.queue_positions(expert_T, None, self.experts)


class Maps(nn.Cell):
    def __init__(self, experts: int, capacity: int) -> None:
        super().__init__()
        self.experts, self.capacity = experts, capacity

    def construct(self, expert_T, position_T):
        return fn.slot_maps(expert_T, position_T, position_T < self.capacity, self.experts, self.capacity)


@pytest.mark.parametrize("tokens", [7, 1024, 4096])
@pytest.mark.parametrize("distinct", [True, False], ids=["distinct", "ties"])
def test_queue_positions_rank_within_the_expert(tokens, distinct):
    experts = 5
    expert = RANDOM.integers(0, experts - 1, tokens)  # the last expert stays empty
    priority = RANDOM.permutation(tokens) / tokens if distinct else RANDOM.integers(0, 3, tokens) / 2
    by_priority, by_order = Positions(experts)(integers(expert), tensor(priority))
    wanted, served = np.zeros(tokens, int), np.zeros(experts, int)
    for token in np.argsort(-priority, kind="stable"):
        wanted[token] = served[expert[token]]
        served[expert[token]] += 1
    np.testing.assert_array_equal(by_priority.asnumpy(), wanted)
    np.testing.assert_array_equal(by_order.asnumpy(), [(expert[:t] == expert[t]).sum() for t in range(tokens)])
    assert by_priority.dtype == ms.int32


def test_slot_maps_are_each_others_inverse():
    experts, capacity, tokens = 4, 3, 20
    expert = RANDOM.integers(0, experts - 1, tokens)
    position = np.array([(expert[:t] == expert[t]).sum() for t in range(tokens)])
    token_of_slot, slot_of_token = (m.asnumpy() for m in Maps(experts, capacity)(integers(expert), integers(position)))
    kept = position < capacity
    np.testing.assert_array_equal(slot_of_token, np.where(kept, expert * capacity + position + 1, 0))
    wanted = np.zeros(experts * capacity, int)
    wanted[slot_of_token[kept] - 1] = np.flatnonzero(kept) + 1
    np.testing.assert_array_equal(token_of_slot, wanted)


class Loss(nn.Cell):
    def construct(self, logits, targets):
        return fn.cross_entropy(logits, targets)


class Losses(nn.Cell):
    def construct(self, logits, targets):
        return fn.token_losses(logits, targets)


def test_losses_and_the_gradient():
    logits, targets = 3 * normal(6, 11), RANDOM.integers(0, 11, 6)
    wanted = -np.log(softmax(logits)[np.arange(6), targets])
    close(Losses()(tensor(logits), integers(targets)), wanted)
    close(Loss()(tensor(logits), integers(targets)), wanted.mean())
    grad = Probe(Loss())(tensor(logits), integers(targets), tensor(np.float32(2.0)))[0]
    close(grad, 2 * (softmax(logits) - np.eye(11)[targets]) / 6)
