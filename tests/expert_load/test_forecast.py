"""Forecasts: closed forms, what every method must keep to, files and errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.forecast import METHODS, forecast, options_of, save_forecast
from pangu_locmoe.expert_load.forecast.auto import CANDIDATES
from pangu_locmoe.expert_load.forecast.score import backtest, errors, table
from pangu_locmoe.expert_load.trace import Trace

QUICK = [name for name in METHODS if name not in ("arima", "lstm")]


def trace_of(share_WLE: np.ndarray, stride: int = 1, tokens: int = 10**9) -> Trace:
    """A trace with these shares, to nine digits."""
    load_WLE = np.round(share_WLE * tokens).astype(np.int64)
    return Trace(1 + stride * np.arange(len(share_WLE)), load_WLE)


def random_trace(
    rows: int, layers: int = 2, experts: int = 5, stride: int = 1, seed: int = 0
) -> Trace:
    random = np.random.default_rng(seed)
    walk_WLE = np.cumsum(random.normal(0, 0.1, (rows, layers, experts)), axis=0)
    share_WLE = np.exp(walk_WLE) / np.exp(walk_WLE).sum(axis=2, keepdims=True)
    return Trace(1 + stride * np.arange(rows), random.poisson(share_WLE * 2000))


def one_series(values: np.ndarray, stride: int = 1) -> Trace:
    """One layer of two experts, the first with these shares."""
    return trace_of(np.stack([values, 1 - values], axis=1)[:, None], stride)


def first(trace: Trace, horizon: int, method: str) -> np.ndarray:
    """The first expert's forecast after the whole trace."""
    return forecast(trace, int(trace.step_W[-1]) + 1, horizon, method).share_YLE[:, 0, 0]


WAVE = 0.3 + 0.1 * np.sin(np.arange(30.0)) + 0.004 * np.arange(30)


def test_last_and_window_mean_and_drift():
    trace = one_series(WAVE)
    np.testing.assert_allclose(first(trace, 3, "last"), WAVE[-1], atol=1e-8)
    np.testing.assert_allclose(first(trace, 3, "window_mean(width=4)"), WAVE[-4:].mean(), atol=1e-8)
    np.testing.assert_allclose(
        first(trace, 3, "window_mean(width=0.5)"), WAVE[-15:].mean(), atol=1e-8
    )
    slope = (WAVE[-1] - WAVE[0]) / 29
    np.testing.assert_allclose(
        first(trace, 3, "drift"), WAVE[-1] + slope * np.array([1, 2, 3]), atol=1e-8
    )


def test_sw_avg_pushes_its_own_mean_back_into_the_window():
    trace = one_series(WAVE)
    np.testing.assert_allclose(first(trace, 5, "sw_avg(window=1)"), WAVE[-1], atol=1e-8)
    # x_n+1 = (x_n + x_n-1) / 2 with x_-1 = a, x_0 = b has the solution (a + 2 b) / 3 + (b - a) / 3
    # * (-1/2)^n
    a, b = WAVE[-2:]
    n = np.arange(1.0, 21.0)
    np.testing.assert_allclose(
        first(trace, 20, "sw_avg(window=2)"), (a + 2 * b) / 3 + (b - a) / 3 * (-0.5) ** n, atol=1e-8
    )
    window = list(WAVE[-10:])
    for _ in range(25):
        window.append(np.mean(window[-10:]))
    np.testing.assert_allclose(first(trace, 25, "sw_avg(window=10)"), window[10:], atol=1e-8)
    weights = np.arange(1, 11) / 55
    assert first(trace, 500, "sw_avg(window=10)")[-1] == pytest.approx(
        WAVE[-10:] @ weights, abs=1e-8
    )


def test_ses_follows_its_recursion_and_keeps_a_constant():
    level = WAVE[0]
    for value in WAVE[1:]:
        level = 0.3 * value + 0.7 * level
    np.testing.assert_allclose(first(one_series(WAVE), 4, "ses(alpha=0.3)"), level, atol=1e-8)
    np.testing.assert_allclose(first(one_series(np.full(30, 0.25)), 4, "ses"), 0.25, atol=1e-8)


@pytest.mark.parametrize("stride", (1, 10))
def test_theta_is_the_mean_of_its_two_lines(stride):
    trace = one_series(WAVE, stride)
    time = np.arange(30.0)
    slope, intercept = np.polyfit(time, WAVE, 1)
    line = intercept + slope * time
    level = 2 * WAVE[0] - line[0]
    for value in 2 * WAVE[1:] - line[1:]:
        level = 0.2 * value + 0.8 * level
    expected = (intercept + slope * np.arange(30, 36) + level) / 2
    np.testing.assert_allclose(
        first(trace, 6 * stride, "theta(alpha=0.2, span=1.0)"), expected, atol=1e-8
    )


def test_trends_are_exact_on_their_own_clock():
    step = 1 + 10 * np.arange(60)
    values = 0.2 + 0.05 * np.log(step)
    trace = one_series(values, 10)
    future = 1 + 10 * np.arange(60, 80)
    np.testing.assert_allclose(
        first(trace, 200, "log_trend(span=1.0, strength=1.0)"),
        0.2 + 0.05 * np.log(future),
        atol=1e-7,
    )
    straight = one_series(0.2 + 0.0005 * step, 10)
    np.testing.assert_allclose(
        first(straight, 200, "linear_trend(span=20, strength=1.0)"),
        0.2 + 0.0005 * future,
        atol=1e-7,
    )
    np.testing.assert_allclose(
        first(trace, 200, "log_trend(span=20, strength=0)"), values[-20:].mean(), atol=1e-8
    )


def test_a_combination_is_the_mean_of_its_parts():
    trace = random_trace(50)
    parts = [forecast(trace, 41, 10, method).share_YLE for method in ("last", "ses(alpha=0.2)")]
    both = forecast(trace, 41, 10, "combination", of=["last", "ses(alpha=0.2)"])
    np.testing.assert_allclose(both.share_YLE, np.mean(parts, axis=0))
    assert both.chosen == (("last", 0.5), ("ses(alpha=0.2)", 0.5))


@pytest.mark.parametrize("method", QUICK)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(2, 120),
    stride=st.sampled_from((1, 3, 10)),
    seed=st.integers(0, 99),
    rows_ahead=st.integers(1, 60),
)
def test_shares_are_shares_and_only_the_past_counts(method, rows, stride, seed, rows_ahead):
    trace = random_trace(rows + 20, stride=stride, seed=seed)
    origin = int(trace.step_W[rows])
    horizon = rows_ahead * stride
    result = forecast(trace, origin, horizon, method)
    assert result.share_YLE.dtype == np.float64 and result.share_YLE.min() >= 0
    np.testing.assert_allclose(result.share_YLE.sum(axis=2), 1, rtol=1e-12)
    np.testing.assert_array_equal(result.step_Y, origin + stride * np.arange(rows_ahead))

    other = Trace(trace.step_W[:rows], trace.load_WLE[:rows])
    np.testing.assert_array_equal(
        forecast(other, origin, horizon, method).share_YLE, result.share_YLE
    )
    changed = trace.load_WLE.copy()
    changed[rows:] = changed[rows:, :, ::-1] + 7
    np.testing.assert_array_equal(
        forecast(Trace(trace.step_W, changed), origin, horizon, method).share_YLE, result.share_YLE
    )

    order = np.random.default_rng(seed).permutation(trace.load_WLE.shape[2])
    turned = forecast(Trace(trace.step_W, trace.load_WLE[:, :, order]), origin, horizon, method)
    np.testing.assert_allclose(turned.share_YLE, result.share_YLE[:, :, order], atol=1e-9)


@pytest.mark.parametrize("method", QUICK)
def test_dead_and_constant_experts_and_empty_layers(method):
    load_WLE = np.zeros((60, 3, 4), dtype=np.int32)
    load_WLE[:, 0] = (0, 10, 20, 70)  # a dead expert, all constant
    load_WLE[:, 1, 0] = 100  # all dead but one; layer 2 has no token at all
    share_YLE = forecast(Trace(np.arange(1, 61), load_WLE), 61, 40, method).share_YLE
    np.testing.assert_allclose(share_YLE[:, 0], [[0, 0.1, 0.2, 0.7]] * 40, atol=1e-12)
    np.testing.assert_allclose(share_YLE[:, 1], [[1, 0, 0, 0]] * 40, atol=1e-12)
    np.testing.assert_allclose(share_YLE[:, 2], 0.25, atol=1e-12)


def test_the_steps_are_the_traces_own():
    trace = random_trace(40, stride=10)  # 1, 11, ..., 391
    assert forecast(trace, 200, 30, "last").step_Y.tolist() == [201, 211, 221]
    assert forecast(trace, 201, 30, "last").step_Y.tolist() == [201, 211, 221]
    assert forecast(trace, 202, 30, "last").step_Y.tolist() == [211, 221, 231]
    assert forecast(trace, 392, 10, "last").step_Y.tolist() == [401]
    assert forecast(trace, 1000, 20, "last").step_Y.tolist() == [1001, 1011]


def test_auto_says_what_it_chose_and_the_choice_can_be_typed():
    trace = random_trace(300)
    result = forecast(trace, 251, 40)
    weights = [weight for _, weight in result.chosen]
    assert len(weights) == 5 and weights == sorted(weights, reverse=True) and sum(weights) <= 1
    assert (
        result.notes["state"] in ("transient", "stable")
        and len(result.notes["backtest_origins"]) >= 3
    )
    for method, _ in result.chosen:
        forecast(trace, 251, 40, method)
    json.dumps(result.to_dict())


def test_auto_finds_the_obvious():
    random = np.random.default_rng(1)
    noise = one_series(np.clip(0.4 + random.normal(0, 0.05, 600), 0, 1))
    assert abs(first(noise, 100, "auto") - 0.4).max() < 0.01
    step = np.arange(1, 601)
    moving = one_series(0.1 + 0.1 * np.log(step))
    future = 0.1 + 0.1 * np.log(np.arange(601, 801))
    assert (
        abs(first(moving, 200, "auto") - future).mean()
        < 0.5 * abs(first(moving, 200, "window_mean") - future).mean()
    )


def test_auto_looks_at_origins_of_the_present_state():
    trace = random_trace(600)
    every = forecast(trace, 601, 100, stable_from=1).notes
    stable = forecast(trace, 601, 100, stable_from=450).notes
    assert (
        every["backtest_origins"] == [201, 321, 401, 461, 501, 551] and every["state"] == "stable"
    )
    assert stable["backtest_origins"] == [461, 501, 551]
    too_young = forecast(trace, 601, 100, stable_from=560).notes  # one origin would be no back-test
    assert too_young["backtest_origins"] == every["backtest_origins"]
    assert "backtest" in forecast(trace.between(1, 15), 15, 10).notes


def test_errors_by_hand():
    load_WLE = np.array([[[5, 5]], [[6, 4]], [[8, 2]], [[4, 6]]])
    trace = Trace(np.arange(1, 5), load_WLE)
    found = errors(forecast(trace, 3, 2, "last"), trace)
    pooled = found["pooled"]
    assert found["rows"] == 2 and found["layers"] == [pooled]
    # forecast .6 .4, came .8 .2 and .4 .6: every |e| is .2; the past changed by .1
    assert pooled["mae_points"] == pytest.approx(20) and pooled["wape"] == pytest.approx(0.4)
    assert pooled["total_variation"] == pytest.approx(0.2) and pooled["mase"] == pytest.approx(2)
    assert pooled["relative_to_last"] == pytest.approx(1) and pooled["mean_wape"] == pytest.approx(
        0, abs=1e-12
    )
    assert pooled["hindsight_wape"] == pytest.approx(0.4)
    json.dumps(found)


def test_errors_are_none_beyond_the_trace():
    trace = random_trace(30)
    assert errors(forecast(trace, 25, 7, "last"), trace) == {
        "rows": 0,
        "pooled": None,
        "layers": None,
    }
    assert errors(forecast(trace, 25, 6, "last"), trace)["rows"] == 6


def test_sampling_floor_is_what_independent_tokens_cost():
    random = np.random.default_rng(2)
    p = random.dirichlet(np.ones(16) * 3)
    trace = Trace(np.arange(1, 601), random.multinomial(1536, p, (600, 1)))
    pooled = errors(forecast(trace, 401, 200, "window_mean(width=400)"), trace)["pooled"]
    assert pooled["sampling_wape"] == pytest.approx(pooled["hindsight_wape"], rel=0.03)
    assert pooled["wape"] == pytest.approx(pooled["sampling_wape"], rel=0.05)


def test_backtest_covers_what_the_trace_covers():
    trace = random_trace(100)
    cases = backtest(
        trace, ["last", "sw_avg(window=5)"], [10, 50], range(20, 100, 20), stable_from=60
    )
    assert len(cases) == 2 * (4 + 2)
    rows = {(row["method"], row["horizon"], row["state"]): row for row in table(cases)}
    assert rows["last", 10, "all"]["origins"] == 4 and rows["last", 10, "stable"]["origins"] == 2
    assert rows["last", 50, "all"]["relative_to_last"] == pytest.approx(1)
    json.dumps(table(cases))


def test_a_forecast_is_written_whole(tmp_path):
    result = forecast(random_trace(40), 30, 10, "ses")
    path = tmp_path / "F.npz"
    path.write_bytes(b"old")
    save_forecast(path, result)
    with np.load(path) as archive:
        np.testing.assert_array_equal(archive["step"], result.step_Y)
        np.testing.assert_array_equal(archive["share"], result.share_YLE)
    assert [file.name for file in tmp_path.iterdir()] == ["F.npz"]
    with pytest.raises(DataError, match="cannot write the forecast"):
        save_forecast(tmp_path / "none" / "F.npz", result)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    (
        (
            (1, 5, "last"),
            {},
            "origin 1: a forecast needs 2 rows before it, there are 0; the trace begins at step 1",
        ),
        ((50, 9, "last"), {}, "horizon 9: must be at least 10, the steps from one row"),
        ((50, 10, "sw-avg"), {}, "method 'sw-avg': did you mean sw_avg?"),
        ((50, 10, "sw_avg(3)"), {}, r"method 'sw_avg\(3\)': write a name or name\(option=value\)"),
        ((50, 10, "sw_agv"), {}, "method 'sw_agv': did you mean sw_avg?"),
        ((50, 10, "qqqqqq"), {}, "method 'qqqqqq': choose one of auto, last"),
        ((50, 10, "sw_avg"), {"windw": 3}, "sw_avg has no option 'windw': did you mean window?"),
        ((50, 10, "last"), {"window": 3}, "last has no option 'window': it takes none"),
        ((50, 10, "sw_avg"), {"window": 0}, "0: a span is a number of rows"),
        ((50, 10, "ses(alpha=0)"), {}, "alpha 0: must be above 0 and at most 1"),
        ((50, 10, "ses"), {"alpha": "x"}, r"ses\(alpha='x'\)"),
        ((50, 10, "log_trend(strength=2)"), {}, "strength 2: must be from 0"),
        ((50, 10, "auto(temperature=0)"), {}, "temperature 0: must be above 0"),
        ((50, 10, "combination(of=[])"), {}, "name one method or more"),
        ((50, 10, "ses(alpha=open('x'))"), {}, "write a name or name"),
    ),
)
def test_bad_input_is_named_in_one_line(arguments, options, message):
    with pytest.raises(DataError, match=message) as caught:
        forecast(random_trace(20, stride=10), *arguments, **options)
    assert "\n" not in str(caught.value)


def test_a_trace_without_layers_is_named():
    with pytest.raises(DataError, match="the trace has 0 sparse layers of 8 experts"):
        forecast(Trace(np.arange(1, 31), np.zeros((30, 0, 8), dtype=int)), 20, 5)


def test_a_window_longer_than_the_past_is_shortened_and_said():
    trace = random_trace(20)
    result = forecast(trace, 11, 5, "sw_avg", window=100)
    assert result.notes == {"window": "100 shortened to the 10 rows there are"}
    np.testing.assert_array_equal(
        result.share_YLE, forecast(trace, 11, 5, "sw_avg", window=10).share_YLE
    )


def test_missing_libraries_are_named(monkeypatch):
    import sys

    for module in (
        "pangu_locmoe.expert_load.forecast.arima",
        "pangu_locmoe.expert_load.forecast.lstm",
    ):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    monkeypatch.setitem(sys.modules, "statsforecast.models", None)
    monkeypatch.setitem(sys.modules, "mindspore", None)
    with pytest.raises(DataError, match=r"pip install 'pangu_locmoe\[forecast\]'"):
        forecast(random_trace(40), 30, 5, "arima")
    with pytest.raises(DataError, match="it needs MindSpore"):
        forecast(random_trace(40), 30, 5, "lstm")


def test_options_can_be_listed():
    assert options_of("sw_avg") == ["window"] and options_of("last") == []
    assert options_of("auto") == ["temperature", "stable_from"]
    assert {name for name, _ in CANDIDATES} <= set(METHODS)
