"""local_hash, the token prior, several experts for a token, and what an output is multiplied by."""

from __future__ import annotations

import numpy as np
import pytest
from support.numeric import close, integers, no_noise, softmax, tensor
from support.small import small_config

from pangu_locmoe.config import doubtful_settings
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.routers import ROUTERS
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.moe.token_table import group_of_expert, token_tables
from pangu_locmoe.parallel.topology import Topology

TOKENS = 64
HIDDEN = 16
EXPERTS = 4
TWO_NODES = {"nodes": 2}


def zipf(vocab_size: int) -> np.ndarray:
    return 10**9 // np.arange(1, vocab_size + 1)


def make(layer: int = 0, parallel=None, **moe):
    config = small_config(moe=moe, parallel=parallel or TWO_NODES)
    allowed_JE = allowed_experts(config)
    counts_JV = np.tile(zipf(config.model.vocab_size), (len(allowed_JE), 1))
    context = RouterContext(layer, allowed_JE, Topology.from_config(config), counts_JV)
    return ROUTERS[config.moe.router](config, context)


def inputs(seed: int = 0):
    random = np.random.default_rng(seed)
    x_TD = random.standard_normal((TOKENS, HIDDEN))
    return x_TD, random.integers(0, 300, TOKENS), random.integers(0, 2, TOKENS)


def route(router, x_TD, tokens_T, domains_T, training=True):
    noise = no_noise(len(x_TD), HIDDEN)
    plan = router(tensor(x_TD), integers(tokens_T), integers(domains_T), noise, training)
    return {name: value.asnumpy() for name, value in plan.items()}


def probabilities(x_TD) -> np.ndarray:
    return softmax(2.0 * x_TD.reshape(len(x_TD), EXPERTS, -1).mean(-1))


# local_hash


@pytest.mark.parametrize("weight", [None, "unit", "probability"])
def test_local_hash_against_numpy(weight):
    router = make(router="local_hash", weight=weight)
    x_TD, tokens_T, domains_T = inputs()
    plan = route(router, x_TD, tokens_T, domains_T)
    probs_TE = probabilities(x_TD)
    mass_TG = probs_TE.reshape(TOKENS, 2, 2).sum(-1)
    group_T = mass_TG.argmax(1)
    table_GV = router.table.asnumpy().reshape(2, 300)
    np.testing.assert_array_equal(plan["expert_A"], table_GV[group_T, tokens_T])
    np.testing.assert_array_equal(plan["one_hot_AE"], np.eye(EXPERTS)[plan["expert_A"]])
    assert set(plan["expert_A"]) == set(range(EXPERTS))
    close(plan["probs_TE"], probs_TE, 2e-6)
    close(plan["affinity_A"], mass_TG.max(1), 2e-6)
    close(plan["weight_A"], mass_TG.max(1) if weight == "probability" else np.ones(TOKENS), 2e-6)


def test_its_tables_are_balanced_inside_each_group_and_differ_by_layer_and_seed():
    tables = make(router="local_hash").table.asnumpy().reshape(2, 300)
    counts_V = 2 * zipf(300)
    for group, experts in enumerate(([0, 1], [2, 3])):
        assert sorted(set(tables[group])) == experts
        load = np.bincount(tables[group] - experts[0], weights=counts_V)
        assert load.max() / load.mean() < 1.01
    other = make(layer=1, router="local_hash").table.asnumpy().reshape(2, 300)
    assert 0.3 < (other == tables).mean() < 0.7


def test_one_group_is_the_hash_router():
    router = make(router="local_hash", node_groups=1)
    x_TD, tokens_T, domains_T = inputs()
    wanted = route(make(router="hash"), x_TD, tokens_T, domains_T)
    got = route(router, x_TD, tokens_T, domains_T)
    for name in ("expert_A", "one_hot_AE", "weight_A"):
        np.testing.assert_array_equal(got[name], wanted[name])


def test_the_number_of_groups_belongs_to_the_model():
    config = small_config(moe={"router": "local_hash"}, parallel=TWO_NODES)
    assert config.moe.node_groups == 2
    assert "node_groups: 2" in config.to_yaml()
    elsewhere = make(router="local_hash", node_groups=2, parallel={"nodes": 1})
    np.testing.assert_array_equal(
        elsewhere.table.asnumpy(), make(router="local_hash").table.asnumpy()
    )
    arguments = inputs()
    np.testing.assert_array_equal(
        route(elsewhere, *arguments)["expert_A"],
        route(make(router="local_hash"), *arguments)["expert_A"],
    )


def test_groups_of_a_sub_model_are_the_whole_models():
    moe = {"router": "local_hash", "num_experts": 3, "node_groups": 2}
    config = small_config(moe={**moe, "cut_from": {"num_experts": 8, "first_expert": 2}})
    np.testing.assert_array_equal(group_of_expert(config), [0, 0, 1])


def test_with_two_levels_a_token_stays_in_its_domains_group():
    router = make(router="local_hash", levels=2, group_sizes={"en": 3, "zh": 1})
    x_TD, tokens_T, domains_T = inputs()
    plan = route(router, 30 * x_TD, tokens_T, domains_T)
    assert set(plan["expert_A"][domains_T == 0]) == {0, 1, 2}
    assert set(plan["expert_A"][domains_T == 1]) == {3}


def test_a_group_without_experts_of_the_domain_has_an_empty_table():
    allowed_JE = np.array([[True, True, False, False]])
    tables = token_tables(np.ones((1, 300), int), allowed_JE, [0], np.array([0, 0, 1, 1]), 2)
    assert tables.shape == (1, 2, 300) and not tables[0, 1].any()
    assert set(tables[0, 0]) == {0, 1}


# the token's prior


@pytest.mark.parametrize("router", ["switch", "locmoe"])
def test_a_prior_is_added_at_the_tokens_entries(router):
    x_TD, tokens_T, domains_T = inputs()
    plain = route(make(router=router), x_TD, tokens_T, domains_T)["probs_TE"]
    with_prior = make(router=router, token_prior=1.5)
    got = route(with_prior, x_TD, tokens_T, domains_T)["probs_TE"]
    # One table for each group where nodes matter.
    tables_GV = with_prior.prior.table.asnumpy().reshape(2 if router == "locmoe" else 1, 300)
    added_TE = np.zeros((TOKENS, EXPERTS))
    for table_V in tables_GV:
        added_TE[np.arange(TOKENS), table_V[tokens_T]] += 1.5
    close(got, softmax(np.log(plain) + added_TE), 2e-5)


def test_a_large_prior_is_a_hash_table():
    x_TD, tokens_T, domains_T = inputs()
    plan = route(make(router="switch", token_prior=100.0), x_TD, tokens_T, domains_T)
    wanted = route(make(router="hash"), x_TD, tokens_T, domains_T)
    np.testing.assert_array_equal(plan["expert_A"], wanted["expert_A"])
    close(plan["weight_A"], np.ones(TOKENS), 1e-6)


def test_a_learned_prior_starts_as_the_frozen_one():
    arguments = inputs()
    frozen = make(router="locmoe", token_prior=1.5)
    learned = make(router="locmoe", token_prior=1.5, learn_token_prior=True)
    np.testing.assert_array_equal(
        route(learned, *arguments)["probs_TE"], route(frozen, *arguments)["probs_TE"]
    )
    assert frozen.trainable_params() == []
    assert [parameter.size for parameter in learned.trainable_params()] == [2 * 300]
    config = small_config(
        moe={"router": "locmoe", "token_prior": 1.5, "learn_token_prior": True}, parallel=TWO_NODES
    )
    assert type(learned).num_params(config) == 2 * 300


# several experts, weights


@pytest.mark.parametrize("router", ["switch", "locmoe"])
@pytest.mark.parametrize("weight", ["probability", "normalized", "unit"])
def test_a_token_has_its_likeliest_experts(router, weight):
    x_TD, tokens_T, domains_T = inputs()
    plan = route(make(router=router, top_k=3, weight=weight), x_TD, tokens_T, domains_T)
    order_TK = np.argsort(-plan["probs_TE"], axis=1)[:, :3]
    np.testing.assert_array_equal(plan["expert_A"].reshape(TOKENS, 3), order_TK)
    np.testing.assert_array_equal(plan["one_hot_AE"], np.eye(EXPERTS)[plan["expert_A"]])
    wanted_TK = np.take_along_axis(plan["probs_TE"], order_TK, axis=1)
    close(plan["affinity_A"].reshape(TOKENS, 3), wanted_TK, 2e-6)
    if weight != "probability":
        wanted_TK = wanted_TK / wanted_TK.sum(1, keepdims=True)
    close(plan["weight_A"].reshape(TOKENS, 3), wanted_TK, 2e-6)


def test_unit_weight_of_one_expert_is_one():
    plan = route(make(router="switch", weight="unit"), *inputs())
    np.testing.assert_array_equal(plan["weight_A"], np.ones(TOKENS, np.float32))


# configuration


@pytest.mark.parametrize(
    "moe, key, rule",
    [
        ({"router": "local_hash", "node_groups": 3}, "moe.node_groups", "must divide"),
        ({"router": "local_hash", "weight": "normalized"}, "moe.weight", "unit or probability"),
        ({"router": "switch", "top_k": 5}, "moe.top_k", "at most moe.num_experts (4)"),
        (
            {"router": "switch", "top_k": 2, "levels": 2, "group_sizes": {"en": 3, "zh": 1}},
            "moe.top_k",
            "smallest domain's group (1)",
        ),
        ({"router": "switch", "weight": "normalized"}, "moe.weight", "needs moe.top_k > 1"),
        ({"learn_token_prior": True}, "moe.learn_token_prior", "needs moe.token_prior above 0"),
        ({"bias_rate": 0.1}, "moe.bias_rate", "needs moe.balance: bias"),
    ],
)
def test_what_cannot_be_is_refused(moe, key, rule):
    with pytest.raises(ConfigError) as caught:
        small_config(moe=moe)
    assert str(caught.value).startswith(f"{key} = ") and rule in str(caught.value)


def test_what_a_router_does_not_use_is_a_note():
    moe = {"top_k": 2, "balance": "quantile", "token_prior": 1.0, "weight": "unit"}
    noted = [
        line.split(" = ")[0]
        for line in doubtful_settings(small_config(moe={"router": "hash", **moe}))
    ]
    assert {"moe.top_k", "moe.balance", "moe.token_prior", "moe.weight"} <= set(noted)
    assert not any(line.startswith("moe.") for line in noted if line in ("moe.levels",))
