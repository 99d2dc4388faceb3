"""LocMoE+: what tokens propose and experts keep, against NumPy, with gradients; what a later
token cannot change.
"""

from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor
from support.numeric import LayerObjective, close, gelu, integers, no_noise, slope, softmax, tensor
from support.small import small_config

from pangu_locmoe.errors import ConfigError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS, factor_capacity
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.gate import grap_weights
from pangu_locmoe.moe.layer import MoELayer
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.evaluate import TokenLosses

TOKENS = 32
HIDDEN = 16
EXPERTS = 4
RANDOM = np.random.default_rng(29)
X_TD = 1.5 * RANDOM.standard_normal((TOKENS, HIDDEN))
SENS_TD = RANDOM.standard_normal((TOKENS, HIDDEN))
TOKENS_T = RANDOM.integers(0, 300, TOKENS)
DOMAINS_T = np.repeat([0, 1], TOKENS // 2)
W_ED = grap_weights(HIDDEN, EXPERTS).astype(float)


def plus_config(threshold: float = 0.6, max_experts: int = 3, parallel=None, **moe):
    choice = {"threshold": threshold, "max_experts": max_experts}
    return small_config(
        moe={"router": "locmoe_plus", "token_choice": choice, **moe},
        parallel=parallel or {"nodes": 2},
    )


def make(config) -> MoELayer:
    allowed_JE = allowed_experts(config)
    return MoELayer.of(
        config,
        RouterContext(
            0, allowed_JE, Topology.from_config(config), np.ones((len(allowed_JE), 300), np.int64)
        ),
    )


@functools.cache
def layer_of(threshold: float, max_experts: int) -> MoELayer:
    return make(plus_config(threshold, max_experts))


def affinities(x_TD):
    """cos(x_t, w_i)."""
    return x_TD @ W_ED.T / np.linalg.norm(x_TD, axis=1)[:, None] / np.linalg.norm(W_ED, axis=1)


def probabilities(x_TD):
    return softmax(HIDDEN**0.5 * affinities(x_TD))


def proposals(probs_TE, threshold, max_experts):
    """bool [T, E]: the fewest experts whose probabilities reach the threshold."""
    proposed_TE = np.zeros(probs_TE.shape, bool)
    for probs_E, proposed_E in zip(probs_TE, proposed_TE):
        total = 0.0
        for expert in np.argsort(-probs_E, kind="stable")[:max_experts]:
            proposed_E[expert] = True
            total += probs_E[expert]
            if total >= threshold:
                break
    return proposed_TE


def keep_best(proposed_TE, affinity_TE, capacity):
    """bool [T, E]: each expert's `capacity` proposals of highest affinity."""
    kept_TE = proposed_TE.copy()
    for expert in range(EXPERTS):
        mine = np.flatnonzero(proposed_TE[:, expert])
        kept_TE[
            mine[np.argsort(-affinity_TE[mine, expert], kind="stable")][
                capacity if capacity != DROPLESS else TOKENS :
            ],
            expert,
        ] = False
    return kept_TE


def output(layer, x_TD, kept_TE):
    w_in = layer.experts.w_in.asnumpy().astype(float)
    w_out = layer.experts.w_out.asnumpy().astype(float)
    y_ETD = np.stack([gelu(x_TD @ w_in[expert]) @ w_out[expert] for expert in range(EXPERTS)])
    return np.einsum("te,etd->td", kept_TE * probabilities(x_TD), y_ETD)


def run(layer, capacity, x_TD=X_TD, training=True):
    y_TD, stats = layer(
        tensor(x_TD),
        integers(TOKENS_T),
        integers(DOMAINS_T),
        no_noise(TOKENS, HIDDEN),
        capacity,
        training,
    )
    return y_TD.asnumpy(), {name: value.asnumpy() for name, value in stats.items()}


def gradients(layer, capacity, jit=False):
    """The objective, its gradient by x, and those by the experts' weights."""
    weights = ms.ParameterTuple(layer.trainable_params())
    function = ms.value_and_grad(LayerObjective(layer, capacity, SENS_TD), 0, weights)
    value, (dx_TD, dweights) = (ms.jit(function) if jit else function)(
        tensor(X_TD), integers(TOKENS_T), integers(DOMAINS_T)
    )
    return [array.asnumpy() for array in (value, dx_TD, *dweights)]


@pytest.mark.parametrize(
    "threshold, max_experts, capacity",
    [
        (0.6, 3, DROPLESS),
        (0.6, 3, 5),
        (0.6, 3, TOKENS),
        (1.0, 4, DROPLESS),
        (1.0, 4, 5),
        (1e-6, 4, 5),
    ],
)
def test_the_layer_against_numpy(threshold, max_experts, capacity):
    """y = sum of p_i * expert_i(x) over the experts that the token chose and that kept it."""
    layer = layer_of(threshold, max_experts)
    affinity_TE = affinities(X_TD)
    proposed_TE = proposals(probabilities(X_TD), threshold, max_experts)
    kept_TE = keep_best(proposed_TE, affinity_TE, capacity)
    y_TD, stats = run(layer, capacity)
    close(y_TD, output(layer, X_TD, kept_TE))
    np.testing.assert_array_equal(stats["load_NE"], proposed_TE.reshape(2, -1, EXPERTS).sum(1))
    np.testing.assert_array_equal(stats["dropped_E"], (proposed_TE & ~kept_TE).sum(0))
    close(stats["unrouted"], (~kept_TE.any(1)).mean())
    close(stats["cosine_T"], affinity_TE.max(1), 2e-6)
    close(stats["weight"], (proposed_TE * probabilities(X_TD)).sum(1).mean(), 2e-6)
    share_E = proposed_TE.sum(0) / proposed_TE.sum()
    close(stats["balance_loss"], EXPERTS * (share_E * probabilities(X_TD).mean(0)).sum(), 2e-6)
    counts = set(proposed_TE.sum(1))
    assert counts == ({1} if threshold < 0.1 else {4} if max_experts == 4 else {1, 2, 3})
    assert capacity != 5 or (stats["unrouted"] > 0 and (kept_TE.sum(1) < proposed_TE.sum(1)).any())


@pytest.mark.parametrize("capacity", [DROPLESS, 5])
def test_gradients_against_finite_differences(capacity):
    """Of outputs and balance loss; who proposes and who is kept is constant nearby."""
    config = plus_config(parallel={"nodes": 1})
    layer = make(config)
    proposed_TE = proposals(probabilities(X_TD), 0.6, 3)
    kept_TE = keep_best(proposed_TE, affinities(X_TD), capacity)
    share_E = proposed_TE.sum(0) / proposed_TE.sum()

    def objective(x_TD):
        return (output(layer, x_TD, kept_TE) * SENS_TD).sum() + EXPERTS * (
            share_E * probabilities(x_TD).mean(0)
        ).sum()

    value, dx_TD, dw_in, dw_out = gradients(layer, capacity)
    close(value, objective(X_TD))
    close(dx_TD, slope(objective, X_TD), 1e-5)
    if capacity != DROPLESS:
        for jitted, plain in zip(
            gradients(layer, capacity, jit=True), (value, dx_TD, dw_in, dw_out)
        ):
            close(jitted, plain, 2e-6)


# Few sizes: each new shape costs more than all the rest.
@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([(0.3, 3), (0.6, 3), (0.9, 3), (1.0, 3)]),
    st.sampled_from([1, 4, 12]),
    st.integers(0, 10**6),
    st.sampled_from([0.2, 1.0, 5.0]),
)
def test_proposals_and_what_is_kept(choice, capacity, seed, sharpness):
    """No expert has more than C tokens, those it keeps are the best that chose it, and a token
    chooses no more than it needs.
    """
    threshold, max_experts = choice
    layer = layer_of(threshold, max_experts)
    x_TD = np.random.default_rng(seed).standard_normal((TOKENS, HIDDEN))
    x_TD[:, : HIDDEN // EXPERTS] *= sharpness
    plan = layer.router(
        tensor(x_TD), integers(TOKENS_T), integers(DOMAINS_T), no_noise(TOKENS, HIDDEN), True
    )
    one_hot_TKE = plan["one_hot_AE"].asnumpy().reshape(TOKENS, max_experts, EXPERTS)
    weight_TK, affinity_TK = (
        plan[name].asnumpy().reshape(TOKENS, max_experts) for name in ("weight_A", "affinity_A")
    )
    proposed_TE = one_hot_TKE.sum(1)
    used_TK = one_hot_TKE.sum(2) > 0
    assert set(np.unique(proposed_TE)) <= {0, 1} and used_TK[:, 0].all()
    # Without its last choice a token would be below the threshold; with it, above or at the limit.
    last_T = used_TK.sum(1) - 1
    sums_T = weight_TK.sum(1)
    assert (sums_T - weight_TK[np.arange(TOKENS), last_T] < threshold + 1e-6).all()
    assert ((sums_T >= threshold - 1e-6) | (last_T == max_experts - 1)).all()
    assert (
        not weight_TK[~used_TK].any()
        and not plan["expert_A"].asnumpy().reshape(TOKENS, -1)[~used_TK].any()
    )
    # Every proposal is of higher affinity than every expert the token passed over.
    affinity_TE = affinities(x_TD)
    worst_T = np.where(proposed_TE > 0, affinity_TE, np.inf).min(1)
    assert (np.where(proposed_TE > 0, -np.inf, affinity_TE).max(1) <= worst_T + 1e-5).all()
    close((one_hot_TKE * affinity_TK[:, :, None]).sum(1), proposed_TE * affinity_TE, 1e-5)
    y_TD, stats = run(layer, capacity, x_TD)
    assert (proposed_TE.sum(0) - stats["dropped_E"] <= capacity).all()
    close(y_TD, output(layer, x_TD, keep_best(proposed_TE > 0, affinity_TE, capacity)), 5e-5)


@pytest.mark.parametrize("groups", [{"en": 3, "zh": 1}, {"en": 2, "zh": 2}], ids=str)
def test_no_token_proposes_outside_its_domains_group(groups):
    """Not even where the probabilities of a group add up to a little less than a threshold of 1."""
    config = plus_config(1.0, 3, levels=2, group_sizes=groups)
    layer = make(config)
    allowed_TE = allowed_experts(config)[DOMAINS_T]
    plan = layer.router(
        tensor(X_TD), integers(TOKENS_T), integers(DOMAINS_T), no_noise(TOKENS, HIDDEN), True
    )
    proposed_TE = plan["one_hot_AE"].asnumpy().reshape(TOKENS, 3, EXPERTS).sum(1) > 0
    assert not proposed_TE[~allowed_TE].any()
    assert (proposed_TE.sum(1) <= allowed_TE.sum(1)).all()
    close(plan["weight_A"].asnumpy().reshape(TOKENS, 3).sum(1), np.ones(TOKENS), 1e-6)


def test_static_sizes_give_the_same():
    factor = 0.75
    config = plus_config(
        parallel={"expert_parallel": 2, "sizes": "static"},
        z_loss=0.1,
        capacity={"local_factor": factor, "remote_factor": 0.1},
    )
    context = RouterContext(
        0, allowed_experts(config), Topology(1, 1, 1, EXPERTS), np.ones((2, 300), np.int64)
    )
    shared = MoELayer.of(config, context, Exchange(SingleProcess(), [0], [0]))
    ordinary = MoELayer.of(config, context)
    capacity = factor_capacity(factor, TOKENS, EXPERTS)
    found = run(shared, capacity)
    wanted = run(ordinary, capacity)
    close(found[0], wanted[0], 2e-6)
    assert found[1].keys() == wanted[1].keys() and wanted[1]["dropped_E"].any()
    for name in wanted[1]:
        close(found[1][name], wanted[1][name], 2e-6)
    for mine, theirs in zip(gradients(shared, capacity), gradients(ordinary, capacity)):
        close(mine, theirs, 2e-6)
    close(
        run(shared, DROPLESS, training=False)[0], run(ordinary, DROPLESS, training=False)[0], 2e-6
    )


def test_unit_weight_makes_equal_experts_the_dense_network():
    layer = make(plus_config())
    for weights in (layer.experts.w_in, layer.experts.w_out):
        weights.set_data(Tensor(np.repeat(weights.asnumpy()[:1], EXPERTS, 0)))
    layer.unit_weight = True
    w_in = layer.experts.w_in.asnumpy()[0].astype(float)
    w_out = layer.experts.w_out.asnumpy()[0].astype(float)
    close(run(layer, DROPLESS)[0], gelu(X_TD @ w_in) @ w_out)


def test_later_tokens_change_no_earlier_loss():
    """The whole model, in evaluation: whom an expert would keep depends on all tokens, but there
    it keeps all.
    """
    config = plus_config(0.8, 3, parallel={"nodes": 1}, capacity={"factor": 1.0})
    model = PanguSigma(config)
    losses, (batch, length) = TokenLosses(model, config), (4, config.model.seq_length)
    random = np.random.default_rng(3)
    first = random.integers(0, 300, (batch, length + 1)).astype(np.int32)
    second = first.copy()
    second[:, 5:] = random.integers(0, 300, (batch, length - 4))
    places_BS = np.tile(np.arange(length, dtype=np.int32), (batch, 1))

    def losses_of(sequences):
        arrays = (
            sequences[:, :-1],
            sequences[:, 1:],
            places_BS,
            np.zeros_like(places_BS),
            np.zeros(batch, np.int32),
        )
        return (
            losses(*(Tensor(np.ascontiguousarray(array)) for array in arrays))
            .asnumpy()
            .reshape(batch, length)
        )

    one = losses_of(first)
    other = losses_of(second)
    close(other[:, :4], one[:, :4], 2e-6)
    assert (np.abs(other - one)[:, 5:] > 1e-3).any()
    # With the training capacity the prefix's losses do depend on what follows: the test above can
    # fail.
    losses.capacities = (3,)
    assert np.abs(losses_of(second) - losses_of(first))[:, :4].max() > 1e-3


@pytest.mark.parametrize(
    "moe, message",
    [
        (
            {"router": "locmoe", "token_choice": {"threshold": 0.5}},
            "moe.token_choice = .*a token of locmoe has one expert",
        ),
        (
            {"token_choice": {"max_experts": 5}},
            r"moe.token_choice.max_experts = 5: must be at most moe.num_experts \(4\)",
        ),
        (
            {"capacity": {"drop_order": "position"}},
            "moe.capacity.drop_order = 'position': must be affinity",
        ),
        (
            {"token_choice": {"transition_steps": 5}, "capacity": {"policy": "dropless"}},
            "moe.token_choice.transition_steps = 5: has no capacity",
        ),
        (
            {"token_choice": {"transition_steps": 500}, "capacity": {"policy": "bound"}},
            "moe.token_choice.transition_steps = 500: must be at most",
        ),
        ({"capacity": {"every": 5}}, "moe.capacity.every = 5: needs moe.capacity.policy: dynamic"),
        (
            {"capacity": {"hysteresis": 0.0}},
            "moe.capacity.hysteresis = 0.0: needs moe.capacity.policy: dynamic",
        ),
    ],
)
def test_what_cannot_be_configured(moe, message):
    with pytest.raises(ConfigError, match=message):
        small_config(moe={"router": "locmoe_plus", **moe})


def test_a_static_step_has_no_transition():
    with pytest.raises(
        ConfigError, match=r"moe.token_choice.transition_steps = 5: needs parallel.sizes: counts"
    ):
        small_config(
            moe={
                "router": "locmoe_plus",
                "token_choice": {"transition_steps": 5},
                "capacity": {"local_factor": 2.0, "remote_factor": 2.0},
            },
            parallel={"expert_parallel": 2, "sizes": "static"},
        )
