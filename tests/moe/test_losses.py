"""The router losses against NumPy, their gradients against float64 finite differences, and what
they are for.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from support.numeric import close, slope, softmax, tensor

from pangu_locmoe.moe import losses

RANDOM = np.random.default_rng(13)
TOKENS = 12
EXPERTS = 4


def probabilities(tokens: int = TOKENS, experts: int = EXPERTS) -> np.ndarray:
    return softmax(RANDOM.standard_normal((tokens, experts)))


def balance(probs_NE, load_NE):
    return probs_NE.shape[1] * (load_NE.sum(0) / load_NE.sum() * probs_NE.mean(0)).sum()


def divergence(p_E, q_E):
    return (p_E * np.log(p_E / q_E)).sum()


def test_balance_loss_and_its_gradient():
    """Of three nodes' means and counts."""
    probs_NE = probabilities(3)
    load_NE = np.array([[2, 0, 1, 1], [1, 0, 2, 1], [2, 0, 1, 1]])
    value, gradient_NE = ms.value_and_grad(losses.balance_loss)(tensor(probs_NE), tensor(load_NE))
    close(value, balance(probs_NE, load_NE), 1e-6)
    close(gradient_NE, slope(lambda p: balance(p, load_NE), probs_NE), 1e-6)
    # not the gradient of a constant: it pushes probability away from the full expert
    assert gradient_NE.asnumpy()[0, 0] > gradient_NE.asnumpy()[0, 1]


@pytest.mark.parametrize("experts", [1, 4, 6])
def test_balance_loss_is_one_when_uniform(experts):
    probs_NE = np.full((3, experts), 1 / experts)
    load_NE = np.full((3, experts), TOKENS / experts)
    close(losses.balance_loss(tensor(probs_NE), tensor(load_NE)), 1.0, 1e-6)


def test_balance_loss_rises_with_skew_to_the_number_of_experts():
    values = []
    for skew in (0.0, 0.25, 0.5, 0.75, 1.0):
        share_E = (1 - skew) / EXPERTS + skew * np.eye(EXPERTS)[0]
        values.append(
            float(losses.balance_loss(tensor(share_E[None]), tensor(share_E[None] * TOKENS)))
        )
    assert values == sorted(values) and len(set(values)) == len(values)
    assert values[0] == pytest.approx(1, rel=1e-6)
    assert values[-1] == pytest.approx(EXPERTS, rel=1e-6)


def test_balance_loss_inside_of_a_router_is_refused():
    """There it could only see its own rank's tokens, and be another objective on another number
    of ranks.
    """
    with pytest.raises(
        ValueError, match="leave balance_loss out of the plan, and the layer computes it"
    ):
        losses.balance_loss(tensor(probabilities()), tensor(np.full(EXPERTS, TOKENS / EXPERTS)))


def test_balance_loss_without_any_assignment_is_zero():
    assert float(losses.balance_loss(tensor(probabilities(3)), tensor(np.zeros((3, EXPERTS))))) == 0


LOCAL_NE = np.array(
    [[True, True, False, False], [False, False, True, True], [False, False, False, False]]
)


def test_local_distribution():
    local_NE = losses.local_distribution(LOCAL_NE, 0.2)
    # 0.8 / 2 + 0.2 / 4 for a local expert, 0.2 / 4 for another
    np.testing.assert_allclose(
        local_NE, [[0.45, 0.45, 0.05, 0.05], [0.05, 0.05, 0.45, 0.45], [0.25] * 4], rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.local_distribution(LOCAL_NE, 1.0), np.full((3, 4), 0.25), rtol=1e-6
    )


def locality_inputs(smoothing: float = 0.1) -> tuple:
    log_local_NE = np.log(losses.local_distribution(LOCAL_NE, smoothing))
    return tensor(log_local_NE), tensor(LOCAL_NE.any(1))


def locality_loss(probs_TE, log_local_NE, has_experts_N):
    """The loss of tokens in equal runs, one for each node."""
    nodes = log_local_NE.shape[0]
    probs_NE = probs_TE.reshape(nodes, -1, EXPERTS).mean(1)
    return losses.locality_loss(probs_NE, losses.log_of(probs_NE), log_local_NE, has_experts_N)


def locality(probs_TE, smoothing=0.1):
    local_NE = losses.local_distribution(LOCAL_NE, smoothing).astype(np.float64)
    nodes = np.split(probs_TE, 3)
    return np.mean(
        [divergence(nodes[i].mean(0), local_NE[i]) for i in range(2)]
    )  # node 2 holds no expert


def test_locality_loss_and_its_gradient():
    probs_TE = probabilities()
    value, gradient_TE = ms.value_and_grad(locality_loss)(tensor(probs_TE), *locality_inputs())
    close(value, locality(probs_TE), 1e-6)
    close(gradient_TE, slope(locality, probs_TE), 2e-6)


def test_locality_loss_is_the_divergence_of_the_current_from_the_local_distribution():
    current_E = np.array([0.1, 0.2, 0.3, 0.4])
    local_E = losses.local_distribution(LOCAL_NE, 0.1)[0].astype(np.float64)
    value = locality_loss(
        tensor(np.tile(current_E, (5, 1))), tensor(np.log(local_E)[None]), tensor([1.0])
    )
    close(value, divergence(current_E, local_E), 1e-6)
    assert (
        abs(float(value) - divergence(local_E, current_E)) > 0.1
    )  # the other direction is another number


def test_locality_loss_is_zero_where_current_equals_local():
    local_NE = losses.local_distribution(LOCAL_NE, 0.1)
    probs_TE = np.repeat(local_NE, TOKENS // 3, axis=0)
    assert float(locality_loss(tensor(probs_TE), *locality_inputs())) == pytest.approx(0, abs=1e-6)
    # and so where only the mean over a node's tokens does
    probs_TE[0], probs_TE[1] = [0.95, 0.0, 0.025, 0.025], [0.0, 0.95, 0.025, 0.025]
    assert float(locality_loss(tensor(probs_TE), *locality_inputs())) == pytest.approx(0, abs=1e-6)


def test_locality_loss_skips_a_node_without_experts():
    probs_TE = probabilities()
    other_TE = probs_TE.copy()
    other_TE[8:] = probabilities(4)
    arguments = locality_inputs()
    value, gradient_TE = ms.value_and_grad(locality_loss)(tensor(probs_TE), *arguments)
    close(locality_loss(tensor(other_TE), *arguments), float(value), 1e-6)
    assert not gradient_TE.asnumpy()[8:].any()
    assert gradient_TE.asnumpy()[:8].all()


def test_locality_loss_without_any_experts_is_zero():
    value = locality_loss(
        tensor(probabilities()), tensor(np.log(np.full((3, 4), 0.25))), tensor(np.zeros(3))
    )
    assert float(value) == 0.0


def test_locality_loss_of_experts_with_probability_zero_is_finite():
    """Two-level routing: experts outside the group have probability 0."""
    probs_TE = np.tile([1.0, 0.0, 0.0, 0.0], (TOKENS, 1))
    value, gradient_TE = ms.value_and_grad(locality_loss)(tensor(probs_TE), *locality_inputs())
    local_NE = losses.local_distribution(LOCAL_NE, 0.1).astype(np.float64)
    close(value, np.mean(-np.log(local_NE[:2, 0])), 1e-6)
    assert np.isfinite(gradient_TE.asnumpy()).all()


def z(logits_TE):
    return (np.log(np.exp(logits_TE).sum(1)) ** 2).mean()


def test_z_loss_and_its_gradient():
    logits_TE = 3 * RANDOM.standard_normal((TOKENS, EXPERTS))
    value, gradient_TE = ms.value_and_grad(losses.z_loss)(tensor(logits_TE))
    close(value, z(logits_TE), 1e-6)
    close(gradient_TE, slope(z, logits_TE), 2e-6)


def test_z_loss_of_large_and_of_masked_logits_is_finite():
    logits_TE = np.array([[500.0, 0.0], [3.0, -1e9]])
    value, gradient_TE = ms.value_and_grad(losses.z_loss)(tensor(logits_TE))
    close(value, (500.0**2 + 3.0**2) / 2, 1e-6)
    close(gradient_TE, np.array([[500.0, 0.0], [3.0, 0.0]]), 1e-6)
