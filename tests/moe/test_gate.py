"""GrAP and the dense gate against NumPy."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from support.numeric import Probe, close, integers, slope, tensor

from pangu_locmoe.moe import gate

RANDOM = np.random.default_rng(11)


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def mode(request):
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=before)


@pytest.mark.parametrize(("hidden_size", "num_experts"), [(16, 4), (12, 1), (12, 12), (5120, 16)])
def test_grap_weights_are_block_means_orthogonal_and_of_one_norm(hidden_size, num_experts):
    w_ED = gate.grap_weights(hidden_size, num_experts)
    assert (w_ED.shape, w_ED.dtype) == ((num_experts, hidden_size), np.float32)
    x_TD = RANDOM.standard_normal((3, hidden_size))
    close(x_TD @ w_ED.T, x_TD.reshape(3, num_experts, -1).mean(-1), 1e-6)
    close(w_ED @ w_ED.T, np.eye(num_experts) * num_experts / hidden_size, 1e-6)


def test_pooling_is_the_product_with_grap_weights(mode):
    x_TD = RANDOM.standard_normal((6, 20))
    scale = 2.5
    pooled_TE = gate.GroupedAveragePooling(5)(tensor(x_TD))
    close(pooled_TE * scale, x_TD @ (gate.grap_weights(20, 5).T * scale), 1e-6)


def test_pooling_has_the_gradient_of_a_mean(mode):
    x_TD = RANDOM.standard_normal((5, 12))
    sens_TE = RANDOM.standard_normal((5, 3))
    gradient_TD = Probe(gate.GroupedAveragePooling(3))(tensor(x_TD), tensor(sens_TE))[0]
    close(gradient_TD, np.repeat(sens_TE / 4, 4, axis=1), 1e-6)
    close(gradient_TD, slope(lambda x: x.reshape(5, 3, 4).mean(-1), x_TD, sens_TE), 1e-6)


def cosines(x_TD, w_ED, expert_T):
    chosen_TD = w_ED[expert_T]
    return (
        (x_TD * chosen_TD).sum(1) / np.linalg.norm(x_TD, axis=1) / np.linalg.norm(chosen_TD, axis=1)
    )


def test_dense_cosine():
    x_TD = RANDOM.standard_normal((9, 16))
    w_ED = RANDOM.standard_normal((4, 16)) * [[0.01], [1], [5], [100]]
    expert_T = RANDOM.integers(0, 4, 9)
    logits_TE = gate.dense_logits(tensor(x_TD), tensor(w_ED))
    close(logits_TE, x_TD @ w_ED.T)
    close(
        gate.dense_cosine(tensor(x_TD), tensor(w_ED), logits_TE, integers(expert_T)),
        cosines(x_TD, w_ED, expert_T),
        2e-6,
    )


@pytest.mark.parametrize("scale", [1.0, 3.7])
def test_grap_cosine(scale):
    x_TD = RANDOM.standard_normal((9, 16)) * 3
    expert_T = RANDOM.integers(0, 4, 9)
    w_ED = gate.grap_weights(16, 4)
    logits_TE = gate.GroupedAveragePooling(4)(tensor(x_TD)) * scale
    factor = scale * float(np.linalg.norm(w_ED[0]))
    close(
        gate.grap_cosine(tensor(x_TD), logits_TE, integers(expert_T), factor),
        cosines(x_TD, w_ED, expert_T),
        2e-6,
    )


def test_a_token_along_a_gate_has_cosine_one_and_a_zero_token_none():
    w_ED = gate.grap_weights(16, 4)
    x_TD = np.stack([5 * w_ED[2], -w_ED[1], np.zeros(16)])
    logits_TE = gate.GroupedAveragePooling(4)(tensor(x_TD))
    cosine_T = gate.grap_cosine(
        tensor(x_TD), logits_TE, integers([2, 1, 0]), float(np.linalg.norm(w_ED[0]))
    )
    close(cosine_T, np.array([1.0, -1.0, 0.0]), 1e-6)
