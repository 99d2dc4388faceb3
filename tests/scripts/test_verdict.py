"""The rules of the verdicts, and claims judged from made-up numbers on both sides of each rule."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study import capacity, recorded, tokens, verdict
from study.verdict import CANNOT, HOLDS, NOT, PARTLY


@pytest.mark.parametrize(
    "values, wanted",
    [
        ([0.2, 0.3], HOLDS),
        ([0.3, 0.05], PARTLY),
        ([0.1, 0.2], PARTLY),
        ([0.19, -0.01], NOT),
        ([0.5, -0.01], HOLDS),
        ([], CANNOT),
    ],
)
def test_at_least_wants_the_mean_or_every_sign(values, wanted):
    assert verdict.at_least(values, 0.2)[0] == wanted


@pytest.mark.parametrize(
    "values, wanted",
    [([0.01, 0.02], HOLDS), ([0.01, 0.03], PARTLY), ([0.01, 0.2], NOT), ([], CANNOT)],
)
def test_at_most_wants_every_value_or_the_mean(values, wanted):
    assert verdict.at_most(values, 0.02, 0.05)[0] == wanted


@pytest.mark.parametrize(
    "values, wanted",
    [([1, 2], HOLDS), ([1, 2, -1], PARTLY), ([1, -1], NOT), ([0], NOT), ([], CANNOT)],
)
def test_positive(values, wanted):
    assert verdict.positive(values, "it is more")[0] == wanted


@pytest.mark.parametrize(
    "parts, wanted", [([True, True], HOLDS), ([True, False], PARTLY), ([False], NOT), ([], CANNOT)]
)
def test_all_of(parts, wanted):
    assert verdict.all_of(parts, "all is well")[0] == wanted


def test_spread_names_the_extremes_where_there_are_several():
    assert (
        verdict.spread([0.5], ".0%"),
        verdict.spread([1.0, 2.0], ".1f"),
        verdict.spread([]),
    ) == ("50%", "1.5 [1.0, 2.0]", "–")


def routers_rows(locmoe_seconds):
    """Rows as compare_routers.sh writes them: hash takes 1 s a step, switch 1.1, two seeds."""
    seconds = {"hash": [1.0, 1.0], "switch": [1.1, 1.1], "locmoe": locmoe_seconds}
    return [
        {
            "router": router,
            "levels": 1,
            "sharding": "domain",
            "capacity": "factor",
            "seed": seed,
            "link_rate": "1mbit",
            "steps": 9,
            "timed_steps": 3,
            "step_seconds": value,
            "exchange_seconds": value / 2,
            "max_over_mean_load": value,
        }
        for router, values in seconds.items()
        for seed, value in enumerate(values, 1)
    ]


def validation_curves():
    return {
        f"{router}-1-domain-seed{seed}": {"validation": [[3, loss]]}
        for router, loss in (("hash", 1.0), ("switch", 3.0), ("locmoe", 2.0))
        for seed in (1, 2)
    }


@pytest.mark.parametrize(
    "seconds, wanted",
    [
        ([0.8, 0.85], [HOLDS, HOLDS, HOLDS]),
        ([0.9, 0.95], [PARTLY, PARTLY, HOLDS]),
        ([1.05, 0.99], [NOT, PARTLY, NOT]),
    ],
)
def test_the_verdicts_of_the_comparison_follow_its_numbers(tmp_path, seconds, wanted):
    (tmp_path / "compare_routers.json").write_text(
        json.dumps(routers_rows(seconds)), encoding="utf-8"
    )
    (tmp_path / "compare_losses.json").write_text(json.dumps(validation_curves()), encoding="utf-8")
    claims = recorded.comparison_claims(tmp_path)
    assert [claim.verdict for claim in claims[:3]] == wanted
    assert claims[-1].verdict == HOLDS


def test_the_slowest_links_are_judged(tmp_path):
    """Rows of several rates stand one after the other."""
    (tmp_path / "compare_losses.json").write_text(json.dumps(validation_curves()), encoding="utf-8")
    fast = [{**row, "link_rate": "9mbit", "step_seconds": 1.0} for row in routers_rows([1.0, 1.0])]
    (tmp_path / "compare_routers.json").write_text(
        json.dumps([*fast, *routers_rows([0.8, 0.85])]), encoding="utf-8"
    )
    claims = recorded.comparison_claims(tmp_path)
    assert [claim.verdict for claim in claims[:2]] == [HOLDS, HOLDS] and "links of 1mbit" in claims[
        0
    ].how


def loss_row(router, factor, loss, seed=1, order="affinity"):
    """A measured case of the capacity study."""
    result = {
        "validation": [[9, loss]],
        "capacity": int(100 * factor),
        "dropped_fraction": 0.25,
        "delta": [],
    }
    return {
        "case": {"router": router, "factor": factor, "seed": seed, "order": order},
        "result": result,
    }


def loss_curve(losses, seed=1):
    return [loss_row("hash", factor, loss, seed) for factor, loss in losses.items()]


def times(**milliseconds):
    """A measured timing case of two rounds, the second slower for all: milliseconds of the first
    by router and factor.
    """
    rows = [
        {"router": router, "factor": factor, "seconds": [ms / 1e3, ms / 5e2]}
        for router, of in milliseconds.items()
        for factor, ms in of.items()
    ]
    return {"case": {"rounds": 2}, "result": rows}


@pytest.mark.parametrize(
    "losses, wanted",
    [
        ({2.0: 1.0, 1.0: 1.005, 0.5: 1.2, 0.25: 1.0}, 1.0),
        ({2.0: 1.0, 1.0: 1.5}, 2.0),
        ({2.0: 1.0, 1.0: 0.9, 0.5: 1.0}, 0.5),
    ],
)
def test_the_knee_is_the_last_factor_before_the_loss_rises(losses, wanted):
    assert capacity.knee(capacity.curve(loss_curve(losses), "hash")) == wanted


def test_losses_are_the_same_within_the_range_of_the_seeds():
    """2% apart on average: a loss 1.5% higher is no higher."""
    apart = capacity.curve(
        [*loss_curve({2.0: 1.0, 1.0: 1.015}), *loss_curve({2.0: 1.02, 1.0: 1.035}, 2)], "hash"
    )
    assert (
        capacity.tolerance(apart) == pytest.approx(0.0197, abs=1e-4) and capacity.knee(apart) == 1.0
    )
    alike = capacity.curve(
        [*loss_curve({2.0: 1.0, 1.0: 1.015}), *loss_curve({2.0: 1.0, 1.0: 1.015}, 2)], "hash"
    )
    assert capacity.tolerance(alike) == 0.01 and capacity.knee(alike) == 2.0


def test_times_are_compared_round_by_round():
    rows = [*loss_curve({2.0: 1.0, 1.0: 1.0}), times(hash={2.0: 100, 1.0: 90})]
    faster = capacity.claims(rows)[1]
    assert faster.claim == "A lower capacity makes a step shorter" and "hash 10.0%" in faster.ours
    assert (faster.verdict, faster.seeds) == (
        HOLDS,
        "1 run",
    ) and "medians of 2 rounds" in faster.how
    assert capacity.claims([*rows[:-1], times(hash={2.0: 100, 1.0: 99})])[1].verdict == NOT


def test_the_table_has_a_row_for_each_router_order_and_factor():
    rows = [
        *loss_curve({2.0: 1.0, 1.0: 1.1}),
        loss_row("hash", 1.0, 1.2, order="position"),
        times(hash={2.0: 100, 1.0: 90}),
    ]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capacity.table(rows).splitlines()[2:]
    ]
    assert lines == [
        ["hash", "least affinity", "2", "200", "1.000", "+0.0%", "25.0%", "150.0"],
        ["hash", "least affinity", "1", "100", "1.100", "+10.0%", "25.0%", "135.0"],
        ["hash", "last position", "1", "100", "1.200", "+20.0%", "25.0%", "–"],
    ]


def test_a_floor_is_the_theorems_tokens_as_a_factor():
    result = {
        "delta": [{"step": 1, "min": [0.0], "median": [0.03], "max": [0.04]}],
        "hidden": 5120,
        "experts": 16,
        "tokens": 160,
    }
    found = capacity.floors(result)
    assert found["min", "exact"] == pytest.approx(1 / 160)
    # Reference values of the theorem: 1.96 tokens exactly at 0.03, 3.8 by the exponential form at
    # 0.04.
    assert found["median", "exact"] == pytest.approx(1.96 / 10, rel=0.01)
    assert found["max", "exponential"] == pytest.approx(3.8 / 10, rel=0.02)


def test_locmoe_plus_is_judged_where_it_was_measured():
    def judged(rows, milliseconds):
        curves = {router: capacity.curve(rows, router) for router in ("locmoe", "locmoe_plus")}
        return capacity._plus(
            {router: results for router, results in curves.items() if results},
            capacity.by_run([times(**milliseconds)]),
            "",
            "",
        )

    ours = [loss_row("locmoe", 1.25, 3.0)]
    plus = [
        loss_row("locmoe_plus", 1.25, 2.9),
        loss_row("locmoe_plus", 0.5, 3.02),
        loss_row("locmoe_plus", 0.25, 3.5),
    ]
    seconds = {"locmoe": {1.25: 100, 1.0: 92}, "locmoe_plus": {1.25: 99, 0.5: 90, 0.25: 50}}
    assert {claim.verdict for claim in judged(ours, seconds)} == {CANNOT}
    time, tokens_ = judged([*ours, *plus], seconds)
    assert "10.0% at factor 0.5" in time.ours and "60% at factor 0.5" in tokens_.ours
    assert (time.verdict, tokens_.verdict) == (HOLDS, HOLDS)
    # Where locmoe itself needs less, that is what LocMoE+ has to beat.
    time, tokens_ = judged([*ours, loss_row("locmoe", 1.0, 3.01), *plus], seconds)
    assert (time.verdict, tokens_.verdict) == (PARTLY, PARTLY) and "against that 2.2%" in time.ours
    assert {claim.verdict for claim in judged([*ours, *plus[2:]], seconds)} == {NOT}


@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_mean_cosines_are_those_of_all_pairs(count, experts, seed):
    random = np.random.default_rng(seed)
    x_TD = random.standard_normal((count, 5))
    expert_T = random.integers(0, experts, count)
    unit = x_TD / np.linalg.norm(x_TD, axis=1, keepdims=True)
    pairs = {True: [], False: []}
    for i in range(count):
        for j in range(count):
            if i != j:
                pairs[bool(expert_T[i] == expert_T[j])].append(unit[i] @ unit[j])
    wanted = [np.mean(pairs[same]) if pairs[same] else np.nan for same in (True, False)]
    np.testing.assert_allclose(tokens.mean_cosines(x_TD, expert_T), wanted, atol=1e-9)


def test_an_expert_is_unused_below_a_tenth_of_an_even_share():
    load_WLE = np.array([[[50, 45, 3, 2], [25, 25, 25, 25]], [[50, 46, 2, 2], [25, 25, 25, 25]]])
    # A tenth of an even share is 2.5%: one expert has exactly that, one has 2%.
    assert tokens.unused_fraction(load_WLE) == 1 / 8


def test_orthogonal_gates_have_cosine_zero():
    assert tokens.mean_gate_cosine(np.eye(3)) == pytest.approx(0)
    assert tokens.mean_gate_cosine(np.array([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(1)
