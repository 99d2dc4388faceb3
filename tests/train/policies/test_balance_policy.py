"""How the routers' biases follow the load between steps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Parameter, Tensor
from support.small import small_config

from pangu_locmoe.train.policies.balance import RATE, Balance

OPTIONS = {"locmoe": 4, "local_hash": 2}


def policy_of(bias_X, **moe):
    """The policy, and the one layer's router."""
    config = small_config(moe={"balance": "bias", **moe}, parallel={"nodes": 2})
    router = SimpleNamespace(bias=Parameter(Tensor(np.asarray(bias_X, np.float32)), name="bias"))
    model = SimpleNamespace(moe_layers={"blocks.1.moe": SimpleNamespace(router=router)})
    assert Balance.wanted(config)
    return Balance(config, SimpleNamespace(model=model)), router


def result(load_NE, bias_LX=None, skipped=False):
    return SimpleNamespace(load_LNE=np.asarray([load_NE]), bias_LX=bias_LX, skipped=skipped)


def after(policy, router, *arguments, **keywords):
    assert list(policy(1, result(*arguments, **keywords))) == []
    return router.bias.asnumpy()


def test_a_bias_moves_by_its_rate_towards_the_mean_load():
    policy, router = policy_of([0.5, 0, 0, 0], bias_rate=0.25)
    bias_X = after(policy, router, [[9, 4, 3, 0], [3, 4, 1, 8]])
    np.testing.assert_array_equal(bias_X, [0.25, 0, 0.25, 0])  # 12, 8, 4, 8: the mean is 8


def test_the_rate_is_deepseeks_where_none_is_given():
    policy, router = policy_of([0, 0, 0, 0])
    np.testing.assert_allclose(
        after(policy, router, [[2, 0, 1, 1]]), [-RATE, RATE, 0, 0], rtol=1e-6
    )


def test_the_mean_is_that_of_the_domains_group():
    policy, router = policy_of([0] * 4, levels=2, bias_rate=1.0)
    np.testing.assert_array_equal(after(policy, router, [[90, 10, 3, 1]]), [-1, 1, -1, 1])


def test_a_node_groups_load_is_that_of_its_experts():
    policy, router = policy_of([0, 0], router="local_hash", bias_rate=1.0)
    np.testing.assert_array_equal(after(policy, router, [[1, 9, 2, 2]]), [-1, 1])


@pytest.mark.parametrize("router", ["locmoe", "local_hash"])
def test_what_a_step_found_is_kept(router):
    found = np.arange(OPTIONS[router], dtype=np.float32)
    policy, layer = policy_of(np.zeros_like(found), router=router, balance="quantile")
    np.testing.assert_array_equal(after(policy, layer, [[1, 1, 1, 1]], bias_LX=found[None]), found)


def test_a_step_that_fp16_skipped_changes_nothing():
    policy, router = policy_of([0.5, 0, 0, 0])
    np.testing.assert_array_equal(
        after(policy, router, [[9, 0, 0, 0]], skipped=True), [0.5, 0, 0, 0]
    )
    assert policy.state() == {}
