"""The routers: hash tables, level 1, and what a plan holds."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor
from support.numeric import close, integers, no_noise, softmax, tensor
from support.small import small_config

from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.moe.domains import allowed_experts, group_sizes
from pangu_locmoe.moe.gate import grap_weights
from pangu_locmoe.moe.layer import MoELayer
from pangu_locmoe.moe.plan import LOSSES
from pangu_locmoe.moe.routers import ROUTERS, Router
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.moe.token_table import balanced_table
from pangu_locmoe.nn.noise import draw_keys
from pangu_locmoe.parallel.topology import Topology

TOKENS = 64
HIDDEN = 16
EXPERTS = 4
TWO_LEVELS = {"levels": 2, "group_sizes": {"en": 3, "zh": 1}}


def zipf(vocab_size: int) -> np.ndarray:
    return 10**9 // np.arange(1, vocab_size + 1)


def make(config, layer: int = 0, counts_JV=None):
    allowed_JE = allowed_experts(config)
    if counts_JV is None:
        counts_JV = np.tile(zipf(config.model.vocab_size), (len(allowed_JE), 1))
    return ROUTERS[config.moe.router](
        config, RouterContext(layer, allowed_JE, Topology.from_config(config), counts_JV)
    )


def inputs(seed: int = 0):
    random = np.random.default_rng(seed)
    return (
        random.standard_normal((TOKENS, HIDDEN)),
        random.integers(0, 300, TOKENS),
        random.integers(0, 2, TOKENS),
    )


def route(router, x_TD, tokens_T, domains_T, training=True, noise=None):
    noise = noise or no_noise(TOKENS, HIDDEN)
    plan = router(tensor(x_TD), integers(tokens_T), integers(domains_T), noise, training)
    return {name: value.asnumpy() for name, value in plan.items()}


def losses_of(config, x_TD, tokens_T, domains_T, training=True):
    """What a layer in one process makes of a plan."""
    allowed_JE = allowed_experts(config)
    counts_JV = np.tile(zipf(config.model.vocab_size), (len(allowed_JE), 1))
    layer = MoELayer.of(
        config, RouterContext(0, allowed_JE, Topology.from_config(config), counts_JV)
    )
    _, stats = layer(
        tensor(x_TD), integers(tokens_T), integers(domains_T), no_noise(TOKENS, HIDDEN), 0, training
    )
    return {name: stats[name].asnumpy() for name in LOSSES}


def test_the_registry_has_the_papers_routers():
    assert {"hash", "switch", "locmoe", "locmoe_plus", "local_hash"} <= set(ROUTERS)
    ours = {name: router for name, router in ROUTERS.items() if ":" not in name}
    assert [name for name, router in ours.items() if not router.traits.has_gate] == ["hash"]


def test_a_new_router_is_one_class():
    class First(Router, name="first"):
        """Everything to expert 0."""

    try:
        assert small_config(moe={"router": "first"}).moe.router == "first"
    finally:
        del ROUTERS["first"], ROUTER_TRAITS["first"]
    with pytest.raises(ConfigError, match=r"moe\.router = 'first'"):
        small_config(moe={"router": "first"})


@pytest.mark.parametrize("router", ["hash", "switch", "locmoe"])
@pytest.mark.parametrize("moe", [{"levels": 1}, TWO_LEVELS], ids=["one level", "two levels"])
def test_a_plan_is_consistent(router, moe):
    plan = route(make(small_config(moe={"router": router, **moe})), *inputs())
    np.testing.assert_array_equal(plan["one_hot_AE"], np.eye(EXPERTS)[plan["expert_A"]])
    assert plan["expert_A"].dtype == np.int32
    for name in ("weight_A", "affinity_A", "cosine_T"):
        assert (plan[name].shape, plan[name].dtype) == ((TOKENS,), np.float32)
    np.testing.assert_array_equal(plan["affinity_A"], plan["weight_A"])
    assert (np.abs(plan["cosine_T"]) <= 1 + 1e-6).all()
    # What follows from all ranks' counts is not a router's to say.
    assert [name for name in LOSSES if name in plan] == ([] if router == "hash" else ["z_loss"])
    for loss in losses_of(small_config(moe={"router": router, **moe}), *inputs()).values():
        assert (loss.shape, loss.dtype) == ((), np.float32)


@pytest.mark.parametrize("router", ["hash", "switch", "locmoe"])
def test_no_token_leaves_its_domains_group(router):
    config = small_config(moe={"router": router, **TWO_LEVELS})
    allowed_JE = allowed_experts(config)
    np.testing.assert_array_equal(
        allowed_JE, [[True, True, True, False], [False, False, False, True]]
    )
    layer = make(config)
    used = set()
    for seed in range(5):
        x_TD, tokens_T, domains_T = inputs(seed)
        plan = route(layer, 30 * x_TD, tokens_T, domains_T)
        assert allowed_JE[domains_T, plan["expert_A"]].all()
        used |= set(plan["expert_A"])
        if ROUTERS[router].traits.has_gate:
            probs_TE = plan["probs_TE"]
            assert not probs_TE[~allowed_JE[domains_T]].any()
            close(probs_TE.sum(1), np.ones(TOKENS), 1e-6)
            np.testing.assert_array_equal(plan["weight_A"], probs_TE.max(1))
            assert (plan["weight_A"][domains_T == 1] == 1).all()  # the only expert of its group
        else:
            np.testing.assert_array_equal(plan["probs_TE"], plan["one_hot_AE"])
    assert used == set(range(EXPERTS))


def test_groups():
    assert group_sizes(small_config(moe={"levels": 2})) == (2, 2)
    assert group_sizes(small_config(moe={"levels": 2, "group_sizes": {"zh": 1, "en": 3}})) == (
        3,
        1,
    )  # in the order of the domains
    assert allowed_experts(small_config()).all()
    assert allowed_experts(small_config()).shape == (2, EXPERTS)
    np.testing.assert_array_equal(
        allowed_experts(small_config(moe={"levels": 2}, data={"sources": []})),
        np.ones((1, EXPERTS), bool),
    )


# gates


@pytest.mark.parametrize("nodes", [1, 2])
def test_locmoe_against_numpy(nodes):
    config = small_config(moe={"z_loss": 0.1}, parallel={"nodes": nodes})
    x_TD, tokens_T, domains_T = inputs()
    plan = route(make(config), x_TD, tokens_T, domains_T)
    w_ED = grap_weights(HIDDEN, EXPERTS).astype(np.float64)
    logits_TE = (HIDDEN / EXPERTS) ** 0.5 * x_TD @ w_ED.T
    probs_TE = softmax(logits_TE)
    expert_T = logits_TE.argmax(1)
    np.testing.assert_array_equal(plan["expert_A"], expert_T)
    close(plan["weight_A"], probs_TE.max(1), 2e-6)
    # sqrt(d/n) times the gate is of norm 1: the logit is |x| times the cosine
    close(plan["cosine_T"], logits_TE.max(1) / np.linalg.norm(x_TD, axis=1), 2e-6)
    share_E = np.bincount(expert_T, minlength=EXPERTS) / TOKENS
    found = losses_of(config, x_TD, tokens_T, domains_T)
    close(found["balance_loss"], EXPERTS * (share_E * probs_TE.mean(0)).sum(), 2e-6)
    close(found["z_loss"], (np.log(np.exp(logits_TE).sum(1)) ** 2).mean(), 2e-6)
    wanted = 0.0
    if nodes == 2:
        current_NE = probs_TE.reshape(2, -1, EXPERTS).mean(1)
        wanted = (
            (
                current_NE
                * np.log(current_NE / [[0.475, 0.475, 0.025, 0.025], [0.025, 0.025, 0.475, 0.475]])
            )
            .sum(1)
            .mean()
        )
    close(found["locality_loss"], wanted, 2e-6)
    assert losses_of(config, x_TD, tokens_T, domains_T, training=False)["locality_loss"] == 0


def test_gate_scale_sharpens():
    x_TD, tokens_T, domains_T = inputs()
    plan = route(make(small_config(moe={"gate_scale": 8.0})), x_TD, tokens_T, domains_T)
    close(plan["weight_A"], softmax(8 * x_TD.reshape(TOKENS, EXPERTS, -1).mean(-1)).max(1), 2e-6)
    close(
        plan["cosine_T"], route(make(small_config()), x_TD, tokens_T, domains_T)["cosine_T"], 2e-6
    )


def test_a_cut_out_gate_pools_over_the_whole_models_blocks():
    config = small_config(moe={"num_experts": 2, "cut_from": {"num_experts": 8, "first_expert": 4}})
    x_TD, tokens_T, domains_T = inputs()
    plan = route(make(config), x_TD, tokens_T, domains_T)
    means_TE = x_TD.reshape(TOKENS, 8, 2).mean(-1)[:, 4:6]
    close(plan["weight_A"], softmax(2**0.5 * means_TE).max(1), 2e-6)
    close(plan["cosine_T"], 2**0.5 * means_TE.max(1) / np.linalg.norm(x_TD, axis=1), 2e-6)


def test_switch_against_numpy():
    router = make(small_config(moe={"router": "switch"}))
    x_TD, tokens_T, domains_T = inputs()
    plan = route(router, x_TD, tokens_T, domains_T)
    w_ED = router.w_ED.asnumpy().astype(np.float64)
    logits_TE = x_TD @ w_ED.T
    expert_T = logits_TE.argmax(1)
    np.testing.assert_array_equal(plan["expert_A"], expert_T)
    close(plan["weight_A"], softmax(logits_TE).max(1), 2e-6)
    close(
        plan["cosine_T"],
        logits_TE.max(1) / np.linalg.norm(x_TD, axis=1) / np.linalg.norm(w_ED[expert_T], axis=1),
        2e-6,
    )
    on_two_nodes = losses_of(
        small_config(moe={"router": "switch"}, parallel={"nodes": 2}), x_TD, tokens_T, domains_T
    )
    assert on_two_nodes["locality_loss"] == 0  # LocMoE's, not Switch's
    other = make(small_config(moe={"router": "switch"}), layer=1)
    assert not np.array_equal(other.w_ED.asnumpy(), router.w_ED.asnumpy())


def test_jitter_is_for_training_only_and_within_its_range():
    x_TD, tokens_T, domains_T = inputs()
    plain = make(small_config(moe={"router": "switch"}))
    shaken = make(small_config(moe={"router": "switch", "jitter": 0.2}))
    noise = tuple(Tensor(key) for key in draw_keys(1, 1, TOKENS, HIDDEN))
    wanted = route(plain, x_TD, tokens_T, domains_T)["weight_A"]
    np.testing.assert_array_equal(
        route(shaken, x_TD, tokens_T, domains_T, training=False, noise=noise)["weight_A"], wanted
    )
    assert (route(shaken, x_TD, tokens_T, domains_T, noise=noise)["weight_A"] != wanted).all()
    # against all-ones weights, the logits are the jittered features
    shaken.w_ED.set_data(tensor(np.eye(EXPERTS, HIDDEN)))
    factor = shaken.logits(tensor(np.ones((TOKENS, HIDDEN))), noise, True).asnumpy()
    assert 0.8 <= factor.min() < 0.82 and 1.18 < factor.max() < 1.2


# hash


def table(config, layer: int = 0, counts_JV=None) -> np.ndarray:
    return make(config, layer, counts_JV).table.asnumpy()


def test_hash_tables_are_fixed_by_the_seed_and_differ_by_layer():
    config = small_config(moe={"router": "hash"})
    first = table(config)
    np.testing.assert_array_equal(table(config), first)
    # independent tables agree on one token in four
    for other in (
        table(config, layer=1),
        table(small_config(moe={"router": "hash"}, train={"seed": 2})),
    ):
        assert 0.1 < (other == first).mean() < 0.45


def test_hash_sends_a_token_where_the_table_says_with_weight_one():
    x_TD, tokens_T, domains_T = inputs()
    config = small_config(moe={"router": "hash", "levels": 2})
    plan = route(make(config), x_TD, tokens_T, domains_T)
    np.testing.assert_array_equal(
        plan["expert_A"], table(config).reshape(2, 300)[domains_T, tokens_T]
    )
    assert (plan["weight_A"] == 1).all()
    assert not plan["cosine_T"].any() and not any(
        losses_of(config, x_TD, tokens_T, domains_T).values()
    )


def test_hash_tables_stay_in_the_domains_group():
    rows = table(small_config(moe={"router": "hash", **TWO_LEVELS})).reshape(2, 300)
    assert set(rows[0]) == {0, 1, 2}
    assert set(rows[1]) == {3}


def test_with_one_level_a_token_has_one_expert_in_all_domains():
    config = small_config(moe={"router": "hash"})
    x_TD, tokens_T, _ = inputs()
    router = make(config)
    assert router.table.shape == (300,)
    plans = [
        route(router, x_TD, tokens_T, np.full(TOKENS, domain))["expert_A"] for domain in (0, 1)
    ]
    np.testing.assert_array_equal(*plans)


def test_with_one_level_the_table_is_balanced_by_all_domains_text():
    counts_JV = np.stack([zipf(300), zipf(300)[::-1]])
    experts_V = table(small_config(moe={"router": "hash"}), counts_JV=counts_JV)
    load_E = np.bincount(experts_V, weights=counts_JV.sum(0))
    assert load_E.max() / load_E.mean() < 1.01


@pytest.mark.parametrize(
    ("vocab_size", "num_experts"), [(8192, 8), (8192, 4), (300, 4), (300, 2), (40000, 8)]
)
def test_tables_are_balanced_by_zipf_frequencies(vocab_size, num_experts):
    """The greedy bound: the fullest expert was below the mean before its last token, so it holds at
    most that token more.

    The order is by frequency times exp(N(0, 0.7)), so an expert's last token is of the rarer half
    but for exp(5 * 0.7).
    """
    counts_V = zipf(vocab_size)
    for seed in range(3):
        experts_V = balanced_table(counts_V, np.arange(num_experts), np.random.default_rng(seed))
        load_E = np.bincount(experts_V, weights=counts_V, minlength=num_experts)
        assert load_E.max() <= load_E.mean() + np.median(counts_V) * np.exp(5 * 0.7)
        # a table without regard to frequency does much worse
        random_E = np.bincount(
            np.random.default_rng(seed).integers(0, num_experts, vocab_size), weights=counts_V
        )
        assert random_E.max() - random_E.mean() > 5 * (load_E.max() - load_E.mean())


def test_a_token_more_frequent_than_an_experts_share_has_its_expert_for_itself():
    counts_V = zipf(8192)
    experts_V = balanced_table(counts_V, np.arange(64), np.random.default_rng(0))
    alone = np.flatnonzero(counts_V > counts_V.sum() / 64 * 1.01)
    assert len(alone) >= 3
    for token in alone:
        assert (experts_V == experts_V[token]).sum() == 1


def test_tokens_never_seen_are_spread_evenly():
    experts_V = balanced_table(
        np.zeros(1000, int), np.array([3, 5, 8, 9]), np.random.default_rng(0)
    )
    assert dict(zip(*np.unique(experts_V, return_counts=True))) == {3: 250, 5: 250, 8: 250, 9: 250}
