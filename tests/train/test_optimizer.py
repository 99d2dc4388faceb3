"""AdamW against a float64 reference of the paper's algorithm."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from pangu_locmoe.train.optimizer import AdamW

SHAPES = [(3, 4, 5), (6, 7), (9,)]
DECAYED = [True, True, False]


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"], autouse=True)
def mode(request):
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=before)


def make(**settings):
    random = np.random.default_rng(3)
    start = [random.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    parameters = [Parameter(Tensor(value), name=f"layer{i}.w") for i, value in enumerate(start)]
    return start, parameters, AdamW(parameters, DECAYED, **settings)


class Update(nn.Cell):
    """The gradients one by one: a tuple of tensors given to a graph is a constant, and each step
    would compile anew.
    """

    def __init__(self, optimizer):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer

    def construct(self, rate, step, *grads):
        return self.optimizer(grads, rate, step)


def gradients(step: int):
    """Large at some steps and small at others, so that clipping sets in and out."""
    random = np.random.default_rng(100 + step)
    return [
        (random.standard_normal(shape) * (3.0 if step % 3 == 0 else 0.02)).astype(np.float32)
        for shape in SHAPES
    ]


def reference(start, steps, rate, beta1, beta2, epsilon, decay, clip):
    """Twenty lines of float64: weights after the steps and the norms met on the way."""
    weights = [value.astype(np.float64) for value in start]
    m = [np.zeros_like(w) for w in weights]
    v = [np.zeros_like(w) for w in weights]
    norms = []
    for step in range(1, steps + 1):
        grads = [g.astype(np.float64) for g in gradients(step)]
        norms.append(np.sqrt(sum((g**2).sum() for g in grads)))
        scale = min(1.0, clip / (norms[-1] + 1e-6)) if clip else 1.0
        for i, grad in enumerate(grads):
            m[i] = beta1 * m[i] + (1 - beta1) * grad * scale
            v[i] = beta2 * v[i] + (1 - beta2) * (grad * scale) ** 2
            weights[i] *= 1 - rate(step) * decay * DECAYED[i]
            weights[i] -= (
                rate(step)
                * (m[i] / (1 - beta1**step))
                / (np.sqrt(v[i] / (1 - beta2**step)) + epsilon)
            )
    return weights, norms


def test_the_host_computes_the_same():
    """What the host makes of a moment, the device adds; the two differ in the last bits."""
    settings = {"epsilon": 1e-6, "weight_decay": 0.1, "clip_norm": 1.0}
    _, here, optimizer = make(**settings)
    _, there, offloaded = make(on_host=[True, False, True], **settings)
    updates = Update(optimizer), Update(offloaded)
    for step in range(1, 11):
        norms = [
            update(
                Tensor(0.01, ms.float32),
                Tensor(step, ms.int32),
                *(Tensor(g) for g in gradients(step)),
            ).asnumpy()
            for update in updates
        ]
        assert norms[0] == norms[1]
    for one, other in zip([*here, *optimizer.state], [*there, *offloaded.state]):
        np.testing.assert_allclose(other.asnumpy(), one.asnumpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(there[1].asnumpy(), here[1].asnumpy())


@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clipped"])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-2], ids=["small epsilon", "large epsilon"])
def test_twenty_steps_match_float64(clip, epsilon):
    start, parameters, optimizer = make(
        beta1=0.9, beta2=0.95, epsilon=epsilon, weight_decay=0.1, clip_norm=clip
    )

    def rate(step):
        return 0.01 * step / 20

    update = Update(optimizer)
    norms = []
    for step in range(1, 21):
        norm = update(
            Tensor(rate(step), ms.float32),
            Tensor(step, ms.int32),
            *(Tensor(g) for g in gradients(step)),
        )
        assert norm.shape == () and norm.dtype == ms.float32
        norms.append(float(norm.asnumpy()))
    weights, wanted_norms = reference(start, 20, rate, 0.9, 0.95, epsilon, 0.1, clip)
    np.testing.assert_allclose(norms, wanted_norms, rtol=1e-5)
    for parameter, wanted in zip(parameters, weights):
        np.testing.assert_allclose(parameter.asnumpy(), wanted, rtol=2e-5, atol=2e-6)


def test_moments_are_named_after_their_parameter_and_not_trained():
    _, _, optimizer = make()
    names = [p.name for p in optimizer.get_parameters()]
    assert {"adam_m.layer0.w", "adam_v.layer2.w"} <= set(names)
    assert not any(
        p.requires_grad for p in optimizer.get_parameters() if p.name.startswith("adam_")
    )


def test_a_flag_for_each_parameter_is_asked_for():
    _, parameters, _ = make()
    with pytest.raises(ValueError, match="2 flags for 3 parameters"):
        AdamW(parameters, [True, False])
