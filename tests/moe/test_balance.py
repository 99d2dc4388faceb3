"""Balance inside the step: against NumPy's quantiles, over divided batches, and in a layer."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.numeric import close, integers, no_noise, softmax, tensor
from support.small import small_config

from pangu_locmoe.moe.balance import BINS, WINDOWS, QuantileBalancer
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.layer import MoELayer
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.parallel.topology import Topology

TOKENS = 2000
OPTIONS = 6


def skewed_scores(seed: int, tokens: int = TOKENS, options: int = OPTIONS) -> np.ndarray:
    """Softmax of noise with a strong preference for the first options."""
    random = np.random.default_rng(seed)
    return softmax(random.standard_normal((tokens, options)) - 0.5 * np.arange(options))


def balancer_of(options: int = OPTIONS, choices: int = 1, allowed_JE=None) -> QuantileBalancer:
    allowed_JE = np.ones((1, options), bool) if allowed_JE is None else allowed_JE
    return QuantileBalancer(np.eye(options, dtype=bool), allowed_JE, choices)


def balanced(balancer, scores_TX, parts: int = 1, bias_X=None, domains_T=None) -> np.ndarray:
    """The bias after one step's rounds, from a batch that is divided over `parts` processes."""
    bias_X = tensor(np.zeros(scores_TX.shape[1]) if bias_X is None else bias_X)
    domains_T = np.zeros(len(scores_TX), int) if domains_T is None else domains_T
    for window in balancer.windows:
        seen = [
            balancer.seen(tensor(scores), bias_X, integers(domains), window).asnumpy()
            for scores, domains in zip(
                np.array_split(scores_TX, parts), np.array_split(domains_T, parts)
            )
        ]
        bias_X = balancer.corrected(Tensor(np.sum(seen, axis=0, dtype=np.float32)), bias_X, window)
    return bias_X.asnumpy()


def load_of(scores_TX, bias_X, choices: int = 1) -> np.ndarray:
    chosen_TK = np.argsort(-(scores_TX.astype(np.float32) + bias_X), axis=1)[:, :choices]
    return np.bincount(chosen_TK.reshape(-1), minlength=scores_TX.shape[1])


def one_round(scores_TX, bias_X, choices: int, window: float) -> np.ndarray:
    """The correction with exact quantiles, as far as the window goes, in float64."""
    biased_TX = scores_TX + bias_X
    sorted_TX = -np.sort(-biased_TX, axis=1)
    kth, after = sorted_TX[:, choices - 1, None], sorted_TX[:, choices, None]
    needed_TX = np.where(biased_TX >= kth, after, kth) - scores_TX
    quantile_X = np.quantile(needed_TX, choices / scores_TX.shape[1], axis=0)
    corrected_X = (bias_X + np.clip(quantile_X, bias_X - window, bias_X + window)) / 2
    return corrected_X - corrected_X.mean()


@pytest.mark.parametrize("choices", [1, 2, 4])
def test_a_round_against_numpys_quantile(choices):
    scores_TX = skewed_scores(0)
    bias_X = np.random.default_rng(1).normal(0, 0.05, OPTIONS)
    balancer = balancer_of(choices=choices)
    zeros_T = integers(np.zeros(TOKENS))
    for window, width in zip(balancer.windows, WINDOWS):
        seen_I = balancer.seen(tensor(scores_TX), tensor(bias_X), zeros_T, window)
        got_X = balancer.corrected(seen_I, tensor(bias_X), window).asnumpy()
        # Half of what a bin is wide, and twice that for the mean, which is taken off.
        np.testing.assert_allclose(
            got_X, one_round(scores_TX, bias_X, choices, width), atol=2 * width / BINS
        )


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_few_steps_even_the_load(seed, choices):
    bias_X = np.zeros(OPTIONS)
    before = load_of(skewed_scores(seed), bias_X, choices)
    for step in range(4):
        scores_TX = skewed_scores(10 * seed + step)
        bias_X = balanced(balancer_of(choices=choices), scores_TX, bias_X=bias_X)
    load_X = load_of(scores_TX, bias_X, choices)
    assert before.max() / before.mean() > 1.5
    assert load_X.max() / load_X.mean() < 1.1


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_bias_is_bit_for_bit_the_same_however_the_batch_is_divided(parts):
    scores_TX = skewed_scores(3)
    balancer = balancer_of()
    np.testing.assert_array_equal(
        balanced(balancer, scores_TX, parts), balanced(balancer, scores_TX)
    )


def test_a_domains_experts_share_what_their_domain_has():
    """Three experts for nine in ten of the tokens, and three for the rest."""
    allowed_JE = np.repeat(np.eye(2, dtype=bool), 3, axis=1)
    domains_T = (np.arange(TOKENS) % 10 == 0).astype(int)
    balancer = balancer_of(allowed_JE=allowed_JE)
    bias_X = None
    for step in range(4):
        scores_TX = skewed_scores(step) + np.where(allowed_JE[domains_T], 0, -1e9)
        bias_X = balanced(balancer, scores_TX, bias_X=bias_X, domains_T=domains_T)
    load_E = load_of(scores_TX, bias_X)
    assert load_E[:3].sum() == 0.9 * TOKENS
    for load in (load_E[:3], load_E[3:]):
        assert load.max() / load.mean() < 1.2


def test_options_of_several_experts_are_due_as_many_times_the_load():
    options_EX = np.repeat(np.eye(2, dtype=bool), [3, 1], axis=0)
    balancer = QuantileBalancer(options_EX, np.ones((1, 4), bool), 1)
    bias_X = None
    for step in range(4):
        scores_TX = skewed_scores(step, options=2)
        bias_X = balanced(balancer, scores_TX, bias_X=bias_X)
    np.testing.assert_allclose(load_of(scores_TX, bias_X) / TOKENS, [0.75, 0.25], atol=0.03)


# in a layer


def layer_of(router: str, **moe) -> MoELayer:
    config = small_config(
        moe={"router": router, "balance": "quantile", **moe}, parallel={"nodes": 2}
    )
    allowed_JE = allowed_experts(config)
    counts_JV = np.ones((len(allowed_JE), config.model.vocab_size), int)
    return MoELayer.of(
        config, RouterContext(0, allowed_JE, Topology.from_config(config), counts_JV)
    )


def run(layer, x_TD, training=True):
    tokens = len(x_TD)
    tokens_T = integers(np.random.default_rng(0).integers(0, 300, tokens))
    domains_T = integers(np.arange(tokens) * 2 // tokens)
    keys = no_noise(*x_TD.shape)
    y_TD, stats = layer(tensor(x_TD), tokens_T, domains_T, keys, 400, training)
    return y_TD.asnumpy(), {name: value.asnumpy() for name, value in stats.items()}


def skewed_rows(seed: int, tokens: int = 400) -> np.ndarray:
    x_TD = np.random.default_rng(seed).standard_normal((tokens, 16))
    x_TD[:, :4] += 0.6  # the first expert's block of features
    return x_TD


@pytest.mark.parametrize(
    "router, moe",
    [("locmoe", {}), ("switch", {}), ("switch", {"top_k": 2}), ("local_hash", {})],
)
def test_in_training_the_layer_evens_its_own_batch(router, moe):
    layer = layer_of(router, **moe)
    if router == "switch":
        layer.router.w_ED.set_data(tensor(np.kron(np.eye(4), np.ones(4)) / 2))
    for step in range(4):
        _, stats = run(layer, skewed_rows(step))
        layer.router.bias.set_data(Tensor(stats["bias_X"]))
    load_X = stats["load_NE"].sum(0) @ layer.router.options(small_config(parallel={"nodes": 2}))
    assert load_X.max() / load_X.mean() < 1.1
    assert stats["balance_loss"] == 0
    # Evaluation uses the bias that training left, and none of its own.
    _, evaluated = run(layer, skewed_rows(3), training=False)
    assert "bias_X" not in evaluated
    layer.router.bias.set_data(tensor(np.zeros(len(load_X))))
    _, without = run(layer, skewed_rows(3), training=False)
    spread = [one["load_NE"].sum(0).std() for one in (evaluated, without)]
    assert spread[0] < 0.6 * spread[1]


def test_evaluation_looks_at_no_other_token():
    layer = layer_of("locmoe")
    layer.router.bias.set_data(tensor([0.1, -0.2, 0.05, 0.05]))
    x_TD = skewed_rows(0)
    whole, _ = run(layer, x_TD, training=False)
    changed = x_TD.copy()
    changed[100:] = -changed[100:]
    part, _ = run(layer, changed, training=False)
    np.testing.assert_array_equal(part[:100], whole[:100])


def test_the_bias_chooses_and_does_not_weigh():
    layer = layer_of("locmoe")
    layer.router.bias.set_data(tensor([-9.0, 0.0, -9.0, -9.0]))
    x_TD = skewed_rows(0, 16)
    plan = layer.router(
        tensor(x_TD), integers(np.zeros(16)), integers(np.zeros(16)), no_noise(16, 16), False
    )
    assert (plan["expert_A"].asnumpy() == 1).all()
    means_TE = x_TD.reshape(16, 4, 4).mean(-1)
    close(plan["weight_A"], softmax(2 * means_TE)[:, 1], 2e-6)


def test_the_compiled_layer_finds_the_same_bias():
    layer = layer_of("locmoe", token_prior=1.0)
    x_TD = skewed_rows(0)
    wanted, stats = run(layer, x_TD)
    got, compiled = run(ms.jit(layer), x_TD)
    close(got, wanted)
    np.testing.assert_array_equal(compiled["bias_X"], stats["bias_X"])
    np.testing.assert_array_equal(compiled["load_NE"], stats["load_NE"])
