"""How good a forecast is, against the rows that came. NumPy only.

One share of one step is mostly sampling noise that nobody can foresee, so two yardsticks stand
beside the errors: the noise of sampling alone, and the best constant known in hindsight. What a
placement lives on is the mean over the horizon: `mean_wape`.
"""

from __future__ import annotations

from typing import Any, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.expert_load.forecast import Forecast, forecast
from pangu_locmoe.expert_load.forecast.past import Past
from pangu_locmoe.expert_load.state import STABLE, TRANSIENT, UNKNOWN
from pangu_locmoe.expert_load.trace import Trace

MEASURES = (
    "mae_points",
    "wape",
    "total_variation",
    "mase",
    "relative_to_last",
    "mean_wape",
    "sampling_wape",
    "hindsight_wape",
)


def errors(forecast: Forecast, trace: Trace) -> dict[str, Any]:
    """Errors of a forecast where the trace covers its horizon.

    Returns `rows` (compared), `pooled` (dict) and `layers` (a dict each); the latter two are None
    if the trace ends before the last forecast step. Rows that the trace lacks in between are left
    out. Of a layer, with e = forecast - share:

        mae_points        mean |e|, in percentage points
        wape              sum |e| / sum share
        total_variation   mean over rows of half the sum |e| (half of wape, as shares sum to 1)
        mase              mean |e| over the mean |change from row to row| before the origin; None if nothing changed there
        relative_to_last  mean |e| over that of repeating the last row before the origin; below 1 is better; None if that was perfect
        mean_wape         wape of the mean over the horizon
        sampling_wape     wape of a perfect forecast if tokens were drawn independently: .8 sqrt(p (1-p) / tokens), summed
        hindsight_wape    wape of the best constant: the mean share of the horizon, known only afterwards

    Pooled: over all layers, as if they were one (every layer weighs the same).
    """
    step_X, in_forecast, in_trace = np.intersect1d(
        forecast.step_Y, trace.step_W, assume_unique=True, return_indices=True
    )
    if len(step_X) == 0 or trace.step_W[-1] < forecast.step_Y[-1]:
        return {"rows": 0, "pooled": None, "layers": None}
    came = Trace(step_X, trace.load_WLE[in_trace])
    past_WLE = Past.of(trace, forecast.origin).share_WLE
    sums = _sums(forecast.share_YLE[in_forecast], came.share_WLE, came.load_WLE, past_WLE)
    layers = [
        _measures({key: float(value_L[layer]) for key, value_L in sums.items()})
        for layer in range(past_WLE.shape[1])
    ]
    pooled = _measures({key: float(value_L.mean()) for key, value_L in sums.items()})
    return {"rows": len(step_X), "pooled": pooled, "layers": layers}


def _sums(
    share_XLE: NDArray[Any], came_XLE: NDArray[Any], load_XLE: NDArray[Any], past_WLE: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Absolute errors [L], summed over experts and averaged over rows.

    A layer's shares sum to 1, so each is a WAPE.
    """

    def absolute(difference_XLE: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(np.abs(difference_XLE).sum(axis=2).mean(axis=0))

    mean_1LE = came_XLE.mean(axis=0, keepdims=True)
    tokens_XL1 = np.maximum(load_XLE.sum(axis=2, keepdims=True), 1)
    return {
        "error": absolute(share_XLE - came_XLE),
        "change": absolute(np.diff(past_WLE, axis=0)),
        "last": absolute(past_WLE[-1] - came_XLE),
        "mean": absolute(share_XLE.mean(axis=0, keepdims=True) - mean_1LE),
        "sampling": absolute(np.sqrt(2 / np.pi * mean_1LE * (1 - mean_1LE) / tokens_XL1)),
        "hindsight": absolute(mean_1LE - came_XLE),
        "experts": np.full(came_XLE.shape[1], came_XLE.shape[2]),
    }


def _measures(sums: dict[str, float]) -> dict[str, float | None]:
    return {
        "mae_points": 100 * sums["error"] / sums["experts"],
        "wape": sums["error"],
        "total_variation": sums["error"] / 2,
        "mase": sums["error"] / sums["change"] if sums["change"] > 0 else None,
        "relative_to_last": sums["error"] / sums["last"] if sums["last"] > 0 else None,
        "mean_wape": sums["mean"],
        "sampling_wape": sums["sampling"],
        "hindsight_wape": sums["hindsight"],
    }


def backtest(
    trace: Trace,
    methods: Sequence[str],
    horizons: Sequence[int],
    origins: Iterable[int],
    stable_from: int | None = None,
    known: bool = True,
) -> list[dict[str, Any]]:
    """Pooled errors of every method from every origin over every horizon that the trace covers.

    Args:
        trace: a run.
        methods: as `forecast` takes them, for example "sw_avg(window=10)".
        horizons, origins: in steps; combinations the trace does not cover are left out.
        stable_from: the step from which the run is stable (`state.states`), for the column `state`;
            None: transient all along.
        known: whether the trace is long enough to tell states; else they are "unknown".
    Returns:
        A dict per case: method, horizon, origin, state ("transient", "stable" or "unknown" at the
        origin), and MEASURES. See `table`.
    Raises DataError as `forecast` does.
    """
    cases = []
    for origin in origins:
        state = (
            UNKNOWN
            if not known
            else TRANSIENT
            if stable_from is None or origin < stable_from
            else STABLE
        )
        for horizon in horizons:
            for method in methods:
                if len(trace.step_W) == 0 or origin + horizon > trace.step_W[-1] + trace.stride:
                    continue
                pooled = errors(forecast(trace, origin, horizon, method), trace)["pooled"]
                if pooled is not None:
                    cases.append(
                        {
                            "method": method,
                            "horizon": horizon,
                            "origin": origin,
                            "state": state,
                            **pooled,
                        }
                    )
    return cases


def table(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The means of a back-test over its origins, by method, horizon and state; `origins` says over
    how many.

    State "all" takes both states together. A measure that no origin has is None.
    """
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for case in cases:
        for state in (case["state"], "all"):
            groups.setdefault((case["method"], case["horizon"], state), []).append(case)
    rows = []
    for (method, horizon, state), members in groups.items():
        row: dict[str, Any] = {
            "method": method,
            "horizon": horizon,
            "state": state,
            "origins": len(members),
        }
        for measure in MEASURES:
            values = [case[measure] for case in members if case[measure] is not None]
            row[measure] = float(np.mean(values)) if values else None
        rows.append(row)
    return rows
