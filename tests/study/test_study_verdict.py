"""The rules of the verdicts, and claims judged from made-up numbers on both sides of each rule."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_locmoe.study import capacity, recorded, tokens, verdict
from pangu_locmoe.study.verdict import CANNOT, HOLDS, NOT, PARTLY


@pytest.mark.parametrize(
    "values, wanted", [([0.2, 0.3], HOLDS), ([0.3, 0.05], PARTLY), ([0.1, 0.2], PARTLY), ([0.19, -0.01], NOT), ([0.5, -0.01], HOLDS), ([], CANNOT)]
)
def test_at_least_wants_the_mean_or_every_sign(values, wanted):
    assert verdict.at_least(values, 0.2)[0] == wanted


@pytest.mark.parametrize("values, wanted", [([0.01, 0.02], HOLDS), ([0.01, 0.03], PARTLY), ([0.01, 0.2], NOT), ([], CANNOT)])
def test_at_most_wants_every_value_or_the_mean(values, wanted):
    assert verdict.at_most(values, 0.02, 0.05)[0] == wanted


@pytest.mark.parametrize("values, wanted", [([1, 2], HOLDS), ([1, 2, -1], PARTLY), ([1, -1], NOT), ([0], NOT), ([], CANNOT)])
def test_positive(values, wanted):
    assert verdict.positive(values, "it is more")[0] == wanted


@pytest.mark.parametrize("parts, wanted", [([True, True], HOLDS), ([True, False], PARTLY), ([False], NOT), ([], CANNOT)])
def test_all_of(parts, wanted):
    assert verdict.all_of(parts, "all is well")[0] == wanted


def test_spread_names_the_extremes_where_there_are_several():
    assert (verdict.spread([0.5], ".0%"), verdict.spread([1.0, 2.0], ".1f"), verdict.spread([])) == ("50%", "1.5 [1.0, 2.0]", "–")


def routers_rows(locmoe_seconds):
    """Rows as compare_routers.sh writes them: hash takes 1 s a step, switch 1.1, two seeds."""
    seconds = {"hash": [1.0, 1.0], "switch": [1.1, 1.1], "locmoe": locmoe_seconds}
    return [
        {
            "router": router, "levels": 1, "sharding": "domain", "capacity": "factor", "seed": seed, "link_rate": "1mbit", "steps": 9, "timed_steps": 3,
            "step_seconds": value, "exchange_seconds": value / 2, "max_over_mean_load": value,
        }
        for router, values in seconds.items() for seed, value in enumerate(values, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("seconds, wanted", [([0.8, 0.85], [HOLDS, HOLDS, HOLDS]), ([0.9, 0.95], [PARTLY, PARTLY, HOLDS]), ([1.05, 0.99], [NOT, PARTLY, NOT])])
def test_the_verdicts_of_the_comparison_follow_its_numbers(tmp_path, seconds, wanted):
    curves = {f"{router}-1-domain-seed{seed}": {"validation": [[3, loss]]} for router, loss in (("hash", 1.0), ("switch", 3.0), ("locmoe", 2.0)) for seed in (1, 2)}
    (tmp_path / "compare_routers.json").write_text(json.dumps(routers_rows(seconds)), encoding="utf-8")
    (tmp_path / "compare_losses.json").write_text(json.dumps(curves), encoding="utf-8")
    claims = recorded.comparison_claims(tmp_path)
    assert [claim.verdict for claim in claims[:3]] == wanted
    assert claims[-1].verdict == HOLDS


def test_the_knee_is_the_last_factor_before_the_loss_rises():
    assert capacity.knee({2.0: 1.0, 1.0: 1.005, 0.5: 1.2, 0.25: 1.0}) == 1.0
    assert capacity.knee({2.0: 1.0, 1.0: 1.5}) == 2.0
    assert capacity.knee({2.0: 1.0, 1.0: 0.9, 0.5: 1.0}) == 0.5


def test_a_floor_is_the_theorems_tokens_as_a_factor():
    result = {"delta": [{"step": 1, "min": [0.0], "median": [0.03], "max": [0.04]}], "hidden": 5120, "experts": 16, "tokens": 160}
    found = capacity.floors(result)
    assert found["min", "exact"] == pytest.approx(1 / 160)
    # Reference values of the theorem: 1.96 tokens exactly at 0.03, 3.8 by the exponential form at 0.04.
    assert found["median", "exact"] == pytest.approx(1.96 / 10, rel=0.01)
    assert found["max", "exponential"] == pytest.approx(3.8 / 10, rel=0.02)


def test_locmoe_plus_is_judged_where_it_was_measured():
    def row(router, factor, loss, seconds):
        result = {"validation": [[9, loss]], "step_seconds": seconds, "capacity": int(100 * factor)}
        return {"case": {"router": router, "factor": factor, "seed": 1, "order": "affinity"}, "result": result}

    ours = [row("locmoe", 1.25, 3.0, 1.0)]
    assert {claim.verdict for claim in capacity._plus({"locmoe": capacity.curve(ours, "locmoe")}, "", "")} == {CANNOT}
    plus = [row("locmoe_plus", 1.25, 2.9, 0.99), row("locmoe_plus", 0.5, 3.02, 0.9), row("locmoe_plus", 0.25, 3.5, 0.5)]
    time, tokens_ = capacity._plus({router: capacity.curve([*ours, *plus], router) for router in ("locmoe", "locmoe_plus")}, "", "")
    assert "10.0% at factor 0.5" in time.ours and "60% at factor 0.5" in tokens_.ours
    assert (time.verdict, tokens_.verdict) == (HOLDS, HOLDS)
    worse = capacity._plus({"locmoe": capacity.curve(ours, "locmoe"), "locmoe_plus": capacity.curve(plus[2:], "locmoe_plus")}, "", "")
    assert {claim.verdict for claim in worse} == {NOT}


@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_mean_cosines_are_those_of_all_pairs(count, experts, seed):
    random = np.random.default_rng(seed)
    x_TD, expert_T = random.standard_normal((count, 5)), random.integers(0, experts, count)
    unit = x_TD / np.linalg.norm(x_TD, axis=1, keepdims=True)
    pairs = {True: [], False: []}
    for i in range(count):
        for j in range(count):
            if i != j:
                pairs[bool(expert_T[i] == expert_T[j])].append(unit[i] @ unit[j])
    wanted = [np.mean(pairs[same]) if pairs[same] else np.nan for same in (True, False)]
    np.testing.assert_allclose(tokens.mean_cosines(x_TD, expert_T), wanted, atol=1e-9)


def test_an_expert_is_unused_below_a_tenth_of_an_even_share():
    load_KLE = np.array([[[50, 45, 3, 2], [25, 25, 25, 25]], [[50, 46, 2, 2], [25, 25, 25, 25]]])
    # A tenth of an even share is 2.5%: one expert has exactly that, one has 2%.
    assert tokens.unused_fraction(load_KLE) == 1 / 8


def test_orthogonal_gates_have_cosine_zero():
    assert tokens.mean_gate_cosine(np.eye(3)) == pytest.approx(0)
    assert tokens.mean_gate_cosine(np.array([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(1)
