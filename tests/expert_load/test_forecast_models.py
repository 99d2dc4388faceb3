"""The paper's two fitted models, on small series: ARIMA (the extra `forecast`) and the LSTM
(MindSpore).
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.forecast import forecast
from pangu_locmoe.expert_load.trace import Trace

NO_ARIMA = "ARIMA needs statsforecast (600 MB): pip install 'pangu_locmoe[forecast]'"


def noisy_trace(
    rows: int = 160, layers: int = 2, experts: int = 4, seed: int = 0, trend: float = 0.0
) -> Trace:
    random = np.random.default_rng(seed)
    logit_WLE = random.normal(0, 0.5, (layers, experts)) + trend * np.linspace(0, 1, rows)[
        :, None, None
    ] * np.linspace(-1, 1, experts)
    share_WLE = np.exp(logit_WLE) / np.exp(logit_WLE).sum(axis=2, keepdims=True)
    return Trace(np.arange(1, rows + 1), random.poisson(1000 * share_WLE))


class TestArima:
    @pytest.fixture(autouse=True)
    def _statsforecast(self):
        pytest.importorskip("statsforecast", reason=NO_ARIMA)

    def test_it_forecasts_shares(self):
        trace = noisy_trace()
        result = forecast(trace, 121, 40, "arima", order=(1, 1, 1))
        np.testing.assert_allclose(result.share_YLE.sum(axis=2), 1)
        assert result.notes["series"] == 8
        came = trace.share_WLE[120:].mean(axis=0)
        assert np.abs(result.share_YLE.mean(axis=0) - came).mean() < 0.02

    def test_hard_series_fall_back_and_are_counted(self, monkeypatch):
        from pangu_locmoe.expert_load.forecast import arima

        def fit(values, order, ahead):
            return (
                (None, "not converged")
                if values[-1] == trace.share_WLE[119, 1, 2]
                else (np.full(ahead, values[-1]), "")
            )

        trace = noisy_trace()
        monkeypatch.setattr(arima, "_fit", fit)
        result = forecast(trace, 121, 5, "arima", jobs=1)
        assert result.notes == {
            "series": 8,
            "fallback_to_ses": 1,
            "fallback_reasons": {"not converged": 1},
        }
        smoothed = forecast(trace, 121, 5, "ses").share_YLE
        last = trace.share_WLE[119]
        raw = np.array([last[1, 0], last[1, 1], smoothed[0, 1, 2], last[1, 3]])
        np.testing.assert_allclose(result.share_YLE[:, 1], [raw / raw.sum()] * 5)

    @pytest.mark.parametrize(
        ("values", "reason"),
        (
            (np.zeros(60), ""),
            (np.full(60, 0.25), ""),
            (np.r_[np.zeros(30), np.nan, np.zeros(29)], None),
            (np.arange(3.0), None),
        ),
    )
    def test_no_series_raises(self, values, reason):
        from pangu_locmoe.expert_load.forecast.arima import _fit

        future, found = _fit(values, (5, 1, 5), 4)
        assert (future is None) == bool(found)
        if reason == "":
            np.testing.assert_array_equal(future, values[:4])

    def test_processes_give_the_same(self):
        trace = noisy_trace(rows=60, experts=8)
        alone = forecast(trace, 61, 10, "arima", order=(1, 1, 0), jobs=1)
        together = forecast(trace, 61, 10, "arima", order=(1, 1, 0), jobs=2)
        np.testing.assert_array_equal(alone.share_YLE, together.share_YLE)

    def test_a_wrong_order_is_named(self):
        with pytest.raises(DataError, match="must be three whole numbers p, d, q"):
            forecast(noisy_trace(), 121, 5, "arima", order=(5, 1))


@functools.cache
def small_lstm():
    return forecast(noisy_trace(), 121, 40, "lstm", updates=20, hidden=8)


class TestLstm:
    @pytest.fixture(autouse=True)
    def _mindspore(self):
        pytest.importorskip("mindspore", reason="the LSTM needs MindSpore")

    def test_a_seed_gives_one_forecast_of_shares(self):
        first = small_lstm()
        again = forecast(noisy_trace(), 121, 40, "lstm", updates=20, hidden=8)
        np.testing.assert_array_equal(first.share_YLE, again.share_YLE)
        np.testing.assert_allclose(first.share_YLE.sum(axis=2), 1)
        assert first.notes["held_out_gain"] >= 0

    def test_it_is_the_window_mean_where_there_is_nothing_to_learn(self):
        trace = noisy_trace()
        result = small_lstm()
        if result.notes["held_out_gain"] == 0:
            mean_LE = trace.share_WLE[120 - result.notes["window_rows"] : 120].mean(axis=0)
            np.testing.assert_allclose(result.share_YLE, [mean_LE] * 40, rtol=0.01)

    @pytest.mark.slow
    def test_it_learns_a_trend_from_another_run(self):
        taught = noisy_trace(400, trend=2.0, seed=1)
        trace = noisy_trace(400, trend=2.0, seed=1)
        result = forecast(trace, 301, 60, "lstm", updates=120, train_on=taught)
        came = trace.share_WLE[300:360]
        window = result.notes["window_rows"]
        flat = np.abs(trace.share_WLE[300 - window : 300].mean(axis=0) - came).mean()
        assert result.notes["held_out_gain"] > 0.05
        assert np.abs(result.share_YLE - came).mean() < 0.95 * flat

    def test_the_past_alone_counts(self):
        trace = noisy_trace()
        changed = trace.load_WLE.copy()
        changed[120:] += 50
        result = forecast(Trace(trace.step_W, changed), 121, 40, "lstm", updates=20, hidden=8)
        np.testing.assert_array_equal(result.share_YLE, small_lstm().share_YLE)

    def test_bad_input_is_named(self):
        trace = noisy_trace()
        with pytest.raises(DataError, match="that run has 3 layers of 4 experts, this one 2 of 4"):
            forecast(trace, 121, 5, "lstm", train_on=noisy_trace(layers=3))
        with pytest.raises(DataError, match="rows are too few to train on"):
            forecast(trace, 11, 5, "lstm")
        with pytest.raises(DataError, match="lstm hidden 0: must be at least 1"):
            forecast(trace, 121, 5, "lstm", hidden=0)
