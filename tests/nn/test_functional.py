"""The fast forms against float64 NumPy, forward and gradient, in both execution modes."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support.numeric import Probe, close, gelu, integers, layer_norm, slope, softmax, tensor

from pangu_locmoe.nn import functional as fn

RANDOM = np.random.default_rng(7)


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"], autouse=True)
def mode(request):
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=before)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape)


@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["centred", "far from zero"])
def test_layer_norm_and_its_gradient(offset):
    x = normal(6, 16) + offset
    sens = normal(6, 16)
    gamma = normal(16)
    beta = normal(16)
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


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_attention_and_its_gradients(again):
    batch = 2
    heads = 2
    queries = 4
    keys = 5
    width = 3
    q = normal(batch, heads, queries, width)
    k = normal(batch, heads, keys, width)
    v = normal(batch, heads, keys, width)
    sens = normal(batch, heads, queries, width)
    mask = np.where(np.arange(keys) > np.arange(queries)[:, None] + 1, -1e9, 0.0)
    full = np.broadcast_to(mask, (batch, heads, queries, keys))

    def attend(q, k, v):
        return softmax(q @ k.swapaxes(-1, -2) + mask) @ v

    cell = fn.Attention()
    if again:
        cell.keep_no_probabilities()
    close(cell(tensor(q), tensor(k), tensor(v), tensor(full)), attend(q, k, v))
    dq, dk, dv, dmask = Probe(cell)(tensor(q), tensor(k), tensor(v), tensor(full), tensor(sens))
    close(dq, slope(lambda x: attend(x, k, v), q, sens))
    close(dk, slope(lambda x: attend(q, x, v), k, sens))
    close(dv, slope(lambda x: attend(q, k, x), v, sens))
    assert not dmask.asnumpy().any()
    close(cell(tensor(q), tensor(k), tensor(v), tensor(mask)), attend(q, k, v))


def test_gelu_and_its_gradient():
    x = np.linspace(-12, 12, 60).reshape(4, 15)
    sens = normal(4, 15)
    close(fn.Gelu()(tensor(x)), gelu(x), 2e-6)
    close(Probe(fn.Gelu())(tensor(x), tensor(sens))[0], slope(gelu, x, sens), 5e-6)


@pytest.fixture
def ascend(monkeypatch):
    """Layers as they are built for an Ascend device; what its operators are called with."""
    asked = []

    def norm(x, shape, gamma, beta, epsilon):
        asked.append((shape, epsilon))
        centred = x - x.mean(-1, keep_dims=True)
        deviation = ops.sqrt((centred * centred).mean(-1, keep_dims=True) + epsilon)
        return centred / deviation * gamma + beta

    def unit(x, approximate):
        asked.append(approximate)
        return 0.5 * x * (1 + ops.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))

    ms.set_context(mode=ms.PYNATIVE_MODE)  # the stand-ins are Python
    monkeypatch.setattr(fn, "on_ascend", lambda: True)
    monkeypatch.setattr(fn.mint.nn.functional, "layer_norm", norm)
    monkeypatch.setattr(fn.mint.nn.functional, "gelu", unit)
    return asked


def test_on_ascend_norm_and_gelu_are_an_operator_each(ascend):
    """By their documented formulas they are what the portable forms are."""
    x = 3 * normal(2, 3, 16)
    y = fn.LayerNorm(16, 1e-4)(Tensor(x.astype(np.float16)))
    assert y.dtype == ms.float16 and ascend == [((16,), 1e-4)]
    close(fn.LayerNorm(16)(tensor(x)), layer_norm(x, np.ones(16), np.zeros(16)), 2e-5)
    close(fn.Gelu()(tensor(x)), gelu(x), 1e-3)  # the CPU's tanh is rough
    assert ascend[-1] == "tanh"


class Loss(nn.Cell):
    def construct(self, logits, targets):
        return fn.cross_entropy(logits, targets)


class Losses(nn.Cell):
    def construct(self, logits, targets):
        return fn.token_losses(logits, targets)


def test_losses_and_the_gradient():
    logits = 3 * normal(6, 11)
    targets = RANDOM.integers(0, 11, 6)
    wanted = -np.log(softmax(logits)[np.arange(6), targets])
    close(Losses()(tensor(logits), integers(targets)), wanted)
    close(Loss()(tensor(logits), integers(targets)), wanted.mean())
    grad = Probe(Loss())(tensor(logits), integers(targets), tensor(np.float32(2.0)))[0]
    close(grad, 2 * (softmax(logits) - np.eye(11)[targets]) / 6)
