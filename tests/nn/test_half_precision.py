"""fp16 over its whole finite range against float64: what is finite in truth is finite here,
forward and gradient.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support.numeric import Probe, integers, softmax, tensor
from support.small import small_config

from pangu_locmoe.model.attention import Attention, attention_mask
from pangu_locmoe.moe import dispatch, gate
from pangu_locmoe.moe.experts import Experts
from pangu_locmoe.nn import functional as fn
from pangu_locmoe.nn.noise import draw_keys, dropout
from pangu_locmoe.parallel.tensor import TensorGroup

RANDOM = np.random.default_rng(3)
LARGEST = 65504.0
SMALLEST = 2.0**-24
EDGES = np.array(
    [0.0, SMALLEST, 6.1e-5, 1e-3, 0.5, 1, 3, 4, 8, 16, 181, 255, 256, 257, 1000, 20000, LARGEST]
)


@pytest.fixture(
    params=[pytest.param(ms.GRAPH_MODE, marks=pytest.mark.slow), ms.PYNATIVE_MODE],
    ids=["graph", "pynative"],
    autouse=True,
)
def mode(request):
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=before)


def half(array) -> Tensor:
    return Tensor(np.asarray(array).astype(np.float16))


def every_number() -> np.ndarray:
    """All finite fp16 numbers, float64 [64, 992]."""
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    return numbers[np.isfinite(numbers)].astype(np.float64).reshape(64, -1)


def scaled_rows(rows: int, width: int) -> np.ndarray:
    """Rows of every magnitude, as fp16 has them, float64."""
    x = RANDOM.uniform(-1, 1, (rows, width)) * np.geomspace(1e-7, LARGEST, rows)[:, None]
    return x.astype(np.float16).astype(np.float64)


def agrees(got: Tensor, wanted: np.ndarray, scale=None, tolerance: float = 2e-3) -> None:
    """fp16 where the truth fits into it; the error relative to `scale`, what the truth is a sum
    of (None: itself).
    """
    fits = np.abs(wanted) <= LARGEST
    values = got.asnumpy().astype(np.float64)
    assert np.isfinite(values[fits]).all()
    error = np.abs(values - wanted)[fits]
    assert (
        error
        <= tolerance
        * np.broadcast_to(np.abs(wanted) if scale is None else scale, wanted.shape)[fits]
        + 1e-6
    ).all(), error.max()


def test_gelu_at_every_number():
    x = every_number()
    cube = 0.044715 * x**3
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + cube)))
    wanted = s + x * s * (1 - s) * 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    agrees(fn.Gelu()(half(x)), x * s)
    agrees(Probe(fn.Gelu())(half(x), half(np.ones_like(x)))[0], wanted, 1.0, 1e-3)
    agrees(Probe(fn.Gelu())(half(x), half(np.full_like(x, 1000)))[0], 1000 * wanted, 1000.0, 1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.stack([sign * np.full(64, edge) for edge in EDGES for sign in (1, -1)]),
        lambda: np.where(np.arange(64) % 2, 1.0, -1.0) * EDGES[:, None],
        lambda: np.eye(64)[:17] * EDGES[:, None],
        lambda: 60000 + RANDOM.integers(-5, 6, (8, 64)) * 32.0,
        lambda: scaled_rows(30, 64),
    ],
    ids=["constant rows", "alternating", "one outlier", "a large mean", "every magnitude"],
)
def test_layer_norm(make):
    x = make().astype(np.float16).astype(np.float64)
    sens = RANDOM.choice([-1.0, 0.5, 2.0], x.shape)
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    agrees(fn.LayerNorm(64)(half(x)), centred * inverse, 8.0, 1e-3)
    (dx,), (dgamma, dbeta) = Probe(fn.LayerNorm(64))(half(x), half(sens))
    slope = (sens * centred).mean(-1, keepdims=True) * inverse**2
    agrees(dx, inverse * (sens - sens.mean(-1, keepdims=True) - centred * slope), 2 * inverse, 1e-3)
    agrees(dgamma, (sens * centred * inverse).sum(0), 16.0 * len(x), 1e-3)
    agrees(dbeta, sens.sum(0))


def attention_case(
    name: str, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (1, 2, 6, 16)
    q, k, v = (random.uniform(-1, 1, shape) for _ in range(3))
    if name == "scores beyond fp16":
        q, k = 300 * q, 300 * k
    if name == "largest":
        q, v = LARGEST * np.sign(q), LARGEST * np.sign(v)
        k = q  # ties between sums of such products are beyond fp32: each token is its own best
    if name == "equal values":
        q, k, v = 3 * q, 3 * k, np.full(shape, -LARGEST)
    if name == "zeros":
        q, k = 0 * q, 0 * k
    if name == "subnormal":
        q, k, v = SMALLEST * np.sign(q), 3 * SMALLEST * np.sign(k), 100 * SMALLEST * v
    return tuple(x.astype(np.float16).astype(np.float64) for x in (q, k, v))


@pytest.mark.parametrize(
    "name", ["scores beyond fp16", "largest", "equal values", "zeros", "subnormal"]
)
@pytest.mark.parametrize("seed", range(3))
def test_attention(name, seed):
    random = np.random.default_rng(seed)
    q, k, v = attention_case(name, random)
    mask = attention_mask(integers(np.zeros((1, 6))), tensor(np.tril(np.ones((6, 6)))), 2)
    seen = np.tril(np.ones((6, 6), bool))
    p = softmax(np.where(seen, q @ k.swapaxes(-1, -2), -np.inf))
    agrees(fn.Attention()(half(q), half(k), half(v), mask), p @ v, np.abs(v).max())
    sens = random.choice([-1.0, 1.0], v.shape)
    dp = sens @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    dq, dk, dv, _ = Probe(fn.Attention())(half(q), half(k), half(v), mask, half(sens))
    largest = np.abs(dp).max()
    agrees(dq, ds @ k, 6 * largest * np.abs(k).max())
    agrees(dk, ds.swapaxes(-1, -2) @ q, 6 * largest * np.abs(q).max())
    agrees(dv, p.swapaxes(-1, -2) @ sens, 6.0)


def test_queries_beyond_fp16_before_their_scaling():
    """x W is 80,000, and a quarter of it the query: two tokens' scores are equal, and their
    values are averaged.
    """
    cell = Attention(small_config(model={"num_heads": 1}).model, [1], TensorGroup.alone())
    cell.w_query.set_data(tensor(np.full((16, 16), 50.0)))
    cell.w_key_value.set_data(tensor(np.concatenate([np.zeros((16, 16)), np.eye(16)], axis=1)))
    cell.w_out.set_data(tensor(np.eye(16)))
    x = np.full((2, 16), 100.0)
    x[1] = 102.0
    mask = attention_mask(integers(np.zeros((1, 2))), tensor(np.tril(np.ones((2, 2)))), 1)
    agrees(cell(half(x), half(x), mask), np.stack([x[0], x.mean(0)]))


class Loss(nn.Cell):
    def construct(self, logits, targets):
        return fn.cross_entropy(logits, targets)


class Losses(nn.Cell):
    def construct(self, logits, targets):
        return fn.token_losses(logits, targets)


@pytest.mark.parametrize(
    "logits",
    [
        np.array(
            [
                [LARGEST, 0, 0, 0],
                [0, 0, -LARGEST, 0],
                [LARGEST, -LARGEST, 0, LARGEST],
                [-LARGEST] * 4,
            ]
        ),
        np.array([[SMALLEST, 0, -SMALLEST, 0], [0.0] * 4]),
        np.array([[100.0, 0, -100, 5], [0, 200, 0, 0]]),
    ],
    ids=["largest", "subnormal", "improbable targets"],
)
def test_losses(logits):
    for target in range(4):
        targets = np.full(len(logits), target)
        peak = logits.max(-1)
        wanted = np.log(np.exp(logits - peak[:, None]).sum(-1)) + peak - logits[:, target]
        np.testing.assert_allclose(
            Losses()(tensor(logits), integers(targets)).asnumpy(), wanted, rtol=5e-6, atol=5e-6
        )
        np.testing.assert_allclose(
            Loss()(tensor(logits), integers(targets)).asnumpy(), wanted.mean(), rtol=5e-6, atol=5e-6
        )
        gradient = Probe(Loss())(tensor(logits), integers(targets), tensor(np.float32(3.0)))[0]
        np.testing.assert_allclose(
            gradient.asnumpy(), 3 * (softmax(logits) - np.eye(4)[target]) / len(logits), atol=1e-6
        )


def test_experts():
    """Inner values from 256 on, where a square overflows: GELU is the identity or zero there,
    and its gradient 1 or 0.
    """
    experts = Experts(
        np.eye(16, dtype=np.float32)[None], np.eye(16, dtype=np.float32)[None], TensorGroup.alone()
    )
    x = np.concatenate([EDGES[-8:], -EDGES[-8:]])[None, None].astype(np.float16).astype(np.float64)
    (dx, *_), _ = Probe(_AllGroups(experts))(half(x), half(np.ones_like(x)))
    agrees(_AllGroups(experts)(half(x)), np.where(x > 0, x, 0))
    agrees(dx, np.where(x > 0, 1.0, 0.0))


class _AllGroups(nn.Cell):
    def __init__(self, experts: Experts) -> None:
        super().__init__(auto_prefix=False)
        self.experts = experts

    def construct(self, x_GCD):
        return self.experts(x_GCD, None)


def test_weights_of_tokens_at_the_largest_rows():
    """A weight's gradient is a sum of products that are beyond fp16 one by one."""
    rows = np.full((2, 4), 60000.0)
    sens = np.array([[2.0, -2, 1, -1], [3.0, 1, -2, -2]])
    positions = integers([1, 2])
    _, dweight, *_ = Probe(dispatch.Combine())(
        half(rows), half([0.5, 0.25]), positions, positions, half(sens)
    )
    agrees(dweight, (rows * sens).sum(1))


class Cosine(nn.Cell):
    def __init__(self, w_ED: np.ndarray) -> None:
        super().__init__()
        self.w_ED = tensor(w_ED)

    def construct(self, x_TD):
        logits_TE = gate.dense_logits(x_TD, self.w_ED)
        return gate.dense_cosine(x_TD, self.w_ED, logits_TE, integers(np.zeros(len(x_TD))))


def test_gates():
    """Gates take fp32 of fp16 rows: cosines, norms, pooled means and their gradients are finite
    everywhere, zero rows included.
    """
    x = np.concatenate([scaled_rows(20, 16), np.zeros((1, 16)), np.full((1, 16), LARGEST)])
    w = RANDOM.standard_normal((4, 16))
    norms = np.linalg.norm(x, axis=1)
    cosine = np.divide(
        x @ w[0], norms * np.linalg.norm(w[0]), out=np.zeros(len(x)), where=norms > 0
    )
    agrees(Cosine(w)(tensor(x)), cosine, 1.0)
    agrees(gate.GroupedAveragePooling(4)(tensor(x)), x.reshape(-1, 4, 4).mean(-1), norms[:, None])
    agrees(
        Probe(gate.GroupedAveragePooling(4))(tensor(x), tensor(np.ones((len(x), 4))))[0],
        np.full(x.shape, 0.25),
    )
    scaled = gate.scaled_to_norm(tensor(x), 4.0).asnumpy()
    kept = norms > 1e-3
    np.testing.assert_allclose(np.linalg.norm(scaled[kept], axis=1), 4, rtol=1e-5)
    assert np.isfinite(scaled).all()


def test_dropout():
    x = scaled_rows(8, 64) / 2
    noise = tuple(integers(keys) for keys in draw_keys(1, 1, 8, 64))
    got = dropout(half(x), 0.5, noise, 1).asnumpy().astype(np.float64)
    exact = 2 * x.astype(np.float16).astype(np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, np.where(got == 0, 0, exact))
