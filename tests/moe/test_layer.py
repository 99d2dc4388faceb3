"""The whole MoE layer: against NumPy, against the dense network, with idle experts, with and
without drops.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from support.numeric import LayerObjective, close, gelu, integers, no_noise, softmax, tensor
from support.small import small_config

from pangu_locmoe.model.block import FeedForward
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.layer import MoELayer
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.parallel.tensor import TensorGroup
from pangu_locmoe.parallel.topology import Topology

TOKENS = 32
HIDDEN = 16
EXPERTS = 4
RANDOM = np.random.default_rng(17)
X_TD = RANDOM.standard_normal((TOKENS, HIDDEN))
SENS_TD = RANDOM.standard_normal((TOKENS, HIDDEN))
TOKENS_T = RANDOM.integers(0, 300, TOKENS)
DOMAINS_T = np.repeat([0, 1], TOKENS // 2)
ROUTERS = ["hash", "switch", "locmoe", "locmoe_plus"]


def make(config) -> MoELayer:
    allowed_JE = allowed_experts(config)
    return MoELayer.of(
        config,
        RouterContext(
            0, allowed_JE, Topology.from_config(config), np.ones((len(allowed_JE), 300), np.int64)
        ),
    )


def run(layer: MoELayer, capacity: int, x_TD=X_TD, training=True):
    y_TD, stats = layer(
        tensor(x_TD),
        integers(TOKENS_T),
        integers(DOMAINS_T),
        no_noise(TOKENS, HIDDEN),
        capacity,
        training,
    )
    return y_TD.asnumpy(), {name: value.asnumpy() for name, value in stats.items()}


def gradients(layer: MoELayer, capacity: int, x_TD=X_TD, jit: bool = False):
    """The objective, its gradient by x, and by each weight by name."""
    weights = ms.ParameterTuple(layer.trainable_params())
    function = ms.value_and_grad(LayerObjective(layer, capacity, SENS_TD), 0, weights)
    function = ms.jit(function) if jit else function
    value, (dx_TD, dweights) = function(tensor(x_TD), integers(TOKENS_T), integers(DOMAINS_T))
    return (
        value.asnumpy(),
        dx_TD.asnumpy(),
        {weight.name.rpartition(".")[2]: d.asnumpy() for weight, d in zip(weights, dweights)},
    )


def same(got, wanted, tolerance=2e-6):
    close(got[0], wanted[0], tolerance)
    close(got[1], wanted[1], tolerance)
    assert got[2].keys() == wanted[2].keys()
    for name in wanted[2]:
        close(got[2][name], wanted[2][name], tolerance)


def experts_numpy(layer: MoELayer, x_TD, expert_T):
    w_in = layer.experts.w_in.asnumpy().astype(float)
    w_out = layer.experts.w_out.asnumpy().astype(float)
    return np.stack([gelu(x @ w_in[expert]) @ w_out[expert] for x, expert in zip(x_TD, expert_T)])


@pytest.mark.parametrize("capacity", [DROPLESS, 3, 8])
@pytest.mark.parametrize("order", ["affinity", "position"])
def test_the_layer_against_numpy(capacity, order):
    """y = p * expert(x) for the likeliest expert; beyond the capacity, the lowest p or the last
    position get zero.
    """
    layer = make(small_config(moe={"capacity": {"drop_order": order}}, parallel={"nodes": 2}))
    logits_TE = 2 * X_TD.reshape(TOKENS, EXPERTS, -1).mean(-1)
    expert_T = logits_TE.argmax(1)
    weight_T = softmax(logits_TE).max(1)
    kept_T = np.ones(TOKENS, bool)
    if capacity != DROPLESS:
        for expert in range(EXPERTS):
            mine = np.flatnonzero(expert_T == expert)
            served = (
                mine[np.argsort(-weight_T[mine], kind="stable")] if order == "affinity" else mine
            )
            kept_T[served[capacity:]] = False
    y_TD, stats = run(layer, capacity)
    close(y_TD, (kept_T * weight_T)[:, None] * experts_numpy(layer, X_TD, expert_T))
    assert not y_TD[~kept_T].any()
    load_NE = np.stack([np.bincount(half, minlength=EXPERTS) for half in np.split(expert_T, 2)])
    np.testing.assert_array_equal(stats["load_NE"], load_NE)
    np.testing.assert_array_equal(
        stats["dropped_E"], np.bincount(expert_T[~kept_T], minlength=EXPERTS)
    )
    assert capacity != 3 or not kept_T.all()
    assert run(layer, capacity, training=False)[1]["load_NE"].shape == (1, EXPERTS)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "capacity",
    [pytest.param(DROPLESS, marks=pytest.mark.slow), TOKENS],
    ids=["dropless", "capacity"],
)
def test_one_expert_equals_the_dense_network(router, capacity):
    config = small_config(moe={"router": router, "num_experts": 1, "balance_loss": 0.0})
    layer = make(config)
    dense = FeedForward(config.model, [9], TensorGroup.alone())
    layer.experts.w_in.set_data(Tensor(dense.w_in.asnumpy()[None]))
    layer.experts.w_out.set_data(Tensor(dense.w_out.asnumpy()[None]))
    y_TD, stats = run(layer, capacity)
    close(y_TD, dense(tensor(X_TD)).asnumpy(), 1e-6)
    assert stats["weight"] == 1
    # Compiled, because in MindSpore 2.10's PyNative one gradient of a softmax over one number
    # breaks all later ones of the process.
    _, dx_TD, dweights = gradients(layer, capacity, jit=True)

    def objective(x_TD):
        return ops.reduce_sum(dense(x_TD) * tensor(SENS_TD))

    wanted_TD, (dw_in, dw_out) = ms.grad(
        objective, 0, ms.ParameterTuple([dense.w_in, dense.w_out])
    )(tensor(X_TD))
    close(dx_TD, wanted_TD.asnumpy(), 2e-6)
    close(dweights["w_in"], dw_in.asnumpy()[None], 2e-6)
    close(dweights["w_out"], dw_out.asnumpy()[None], 2e-6)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("capacity", [DROPLESS, 8], ids=["dropless", "capacity"])
def test_an_expert_without_tokens_has_a_zero_gradient(router, capacity):
    layer = make(small_config(moe={"router": router, "z_loss": 0.1}, parallel={"nodes": 2}))
    idle = 2
    x_TD = X_TD.copy()
    if router == "hash":
        layer.router.table.set_data(integers(np.array([0, 1, 3])[np.arange(300) % 3]))
    elif router == "switch":
        layer.router.w_ED.set_data(
            tensor(
                np.where(
                    np.arange(EXPERTS)[:, None] == idle,
                    -10.0,
                    RANDOM.standard_normal((EXPERTS, HIDDEN)),
                )
            )
        )
        x_TD = np.abs(x_TD)
    else:
        x_TD[:, 8:12] -= 50
    _, stats = run(layer, capacity, x_TD)
    load_E = stats["load_NE"].sum(0)
    assert load_E[idle] == 0 and (
        load_E.sum() > TOKENS if router == "locmoe_plus" else load_E.sum() == TOKENS
    )
    value, dx_TD, dweights = gradients(layer, capacity, x_TD)
    assert np.isfinite(value) and np.isfinite(dx_TD).all()
    for name in ("w_in", "w_out"):
        assert np.isfinite(dweights[name]).all()
        assert not dweights[name][idle].any()
        assert all(dweights[name][expert].any() for expert in np.flatnonzero(load_E))


@pytest.mark.parametrize("router", ROUTERS)
def test_dropless_equals_a_capacity_that_drops_nothing(router):
    layer = make(small_config(moe={"router": router, "z_loss": 0.1}, parallel={"nodes": 2}))
    dropless = run(layer, DROPLESS)
    roomy = run(layer, TOKENS)
    close(dropless[0], roomy[0], 2e-6)
    for name in roomy[1]:
        np.testing.assert_array_equal(dropless[1][name], roomy[1][name])
    assert not roomy[1]["dropped_E"].any()
    same(gradients(layer, DROPLESS), gradients(layer, TOKENS))


def test_all_tokens_to_one_expert_still_fit_dropless():
    layer = make(small_config(moe={"router": "hash"}))
    layer.router.table.set_data(integers(np.full(300, 3)))
    y_TD, stats = run(layer, DROPLESS)
    close(y_TD, experts_numpy(layer, X_TD, np.full(TOKENS, 3)))
    np.testing.assert_array_equal(stats["load_NE"], [[0, 0, 0, TOKENS]])


@pytest.mark.parametrize("capacity", [DROPLESS, 3], ids=["dropless", "capacity"])
def test_the_compiled_layer_equals_the_uncompiled_one(capacity):
    layer = make(
        small_config(moe={"router": "switch", "z_loss": 0.1, "levels": 2}, parallel={"nodes": 2})
    )
    same(gradients(layer, capacity, jit=True), gradients(layer, capacity))


def test_a_dropped_token_gets_no_gradient_from_its_expert():
    layer = make(small_config(moe={"router": "hash", "capacity": {"drop_order": "position"}}))
    layer.router.table.set_data(integers(np.zeros(300)))
    _, dx_TD, _ = gradients(layer, 5)
    assert dx_TD[:5].any(1).all()
    assert not dx_TD[5:].any()


def test_unit_weight_leaves_the_experts_output_unscaled():
    layer = make(small_config())
    scaled, stats = run(layer, DROPLESS)
    layer.unit_weight = True
    weight_T = softmax(2 * X_TD.reshape(TOKENS, EXPERTS, -1).mean(-1)).max(1)
    close(run(layer, DROPLESS)[0] * weight_T[:, None], scaled, 2e-6)
    close(stats["weight"], weight_T.mean(), 2e-6)
