"""Forecasts of expert load: shares of the next steps from the rows before an origin.

NumPy only, but for arima and lstm.

    past.py     the rows before the origin
    lines.py    methods that are a level and a slope: last, drift, window_mean, ses, theta, linear_trend, log_trend
    methods.py  all methods by name: the lines, sw_avg, combination, arima, lstm, auto
    auto.py     the choice by rolling back-test
    score.py    errors of a forecast, and back-tests over a trace

The paper is arXiv 2404.16914, section 5. Letters: W past rows, Y rows to come, L sparse layers, E
experts.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.forecast.methods import METHODS, normalised, options_of, predict
from pangu_locmoe.expert_load.forecast.past import Past
from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.files import write_atomic

__all__ = ["METHODS", "Forecast", "forecast", "mean_share", "options_of", "save_forecast"]


@dataclass(frozen=True)
class Forecast:
    """Shares of future steps. Y rows, L layers, E experts.

    Attributes:
        step_Y: int64, the steps forecast.
        share_YLE: float64, >= 0, each layer of a row sums to 1.
        method: as asked for.
        origin, horizon: as asked for, in steps.
        chosen: what `auto` (the heaviest only) or `combination` averaged: (method, weight); empty
            for other methods.
        notes: what the user should know, JSON-able, for example the series that ARIMA gave up.
    """

    step_Y: NDArray[np.int64]
    share_YLE: NDArray[np.float64]
    method: str
    origin: int
    horizon: int
    chosen: tuple[tuple[str, float], ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All but the shares, for JSON."""
        return {
            "method": self.method,
            "origin": self.origin,
            "horizon": self.horizon,
            "rows": len(self.step_Y),
            "first_step": int(self.step_Y[0]),
            "last_step": int(self.step_Y[-1]),
            "chosen": [{"method": method, "weight": weight} for method, weight in self.chosen],
            "notes": self.notes,
        }


def forecast(
    trace: Trace, origin: int, horizon: int, method: str = "auto", **options: Any
) -> Forecast:
    """Forecast the shares of `horizon` steps from `origin` on.

    Only rows with step < origin are looked at. The forecast is for the steps in [origin, origin +
    horizon) that lie a whole number of strides after the last of these rows: the rows the trace
    records itself if it goes on as before. A trace of every 10th step (1, 11, 21, ...), origin 200,
    horizon 30 gives steps 201, 211 and 221.

    Args:
        trace: the run so far, or all of it.
        origin: step, the first that may be forecast.
        horizon: steps, at least the trace's stride.
        method: a name of METHODS, or `name(option=value)`.
        options: of the method; `options_of(name)` lists them.
    Raises:
        DataError: too few rows before the origin, a horizon under a stride, an unknown method or
            option, a value that is not allowed, or a library that is not installed.
    """
    past = Past.of(trace, origin)
    step_Y = past.future(origin, horizon)
    prediction = predict(method, past, step_Y, options)
    return Forecast(
        step_Y,
        normalised(prediction.share_YLE),
        method,
        origin,
        horizon,
        prediction.chosen,
        prediction.notes,
    )


def mean_share(past: Trace, origin: int, horizon: int) -> NDArray[np.float64]:
    """Each expert's mean share over the horizon as `auto` forecasts it, [L, E]: what a placement is
    planned for.

    Of a single row, from which nothing can be forecast, its shares.
    """
    if np.searchsorted(past.step_W, origin) == 1:
        return past.share_WLE[0]
    mean_LE: NDArray[np.float64] = forecast(past, origin, horizon).share_YLE.mean(axis=0)
    return mean_LE


def save_forecast(path: Path, forecast: Forecast) -> None:
    """Write `step` int64 [Y] and `share` float64 [Y, L, E] as .npz, whole or not at all.

    Raises DataError if it cannot.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, step=forecast.step_Y, share=forecast.share_YLE)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise DataError(f"{path}: cannot write the forecast: {error.strerror or error}") from None
