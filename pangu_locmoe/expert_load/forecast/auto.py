"""`auto`: every line is tried on the trace's own past and counts as much as it would have been
right. NumPy only.

Rolling back-test: stand at several earlier rows, forecast the rows after them, compare. What
decides is the mean of a stretch of rows, not the single row: a single share is mostly sampling
noise, which no method foresees and which only blurs the comparison. Rather than take the winner,
whose lead is often luck, the candidates are averaged with weights that fall off as exp(-excess
error / TEMPERATURE): clear losers vanish, near ties share.

One choice for all layers: per layer there is less to judge by, and on the recorded traces it chose
worse. I candidates, B stretches, X series (layers x experts), W rows, Y rows to come.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.forecast.lines import LINES, Line
from pangu_locmoe.expert_load.forecast.past import Past, Prediction
from pangu_locmoe.expert_load.forecast.spec import label
from pangu_locmoe.expert_load.state import STABLE, TRANSIENT, WINDOW, states
from pangu_locmoe.expert_load.trace import Trace

# No width suits all runs, early and late: widths in rows for noise, parts of the past for a run
# that slows down as it ages.
CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("last", {}),
    *(
        ("window_mean", {"width": width})
        for width in (5, 10, 20, 50, 100, 200, 400, 0.1, 0.25, 0.5, 1.0)
    ),
    *(("ses", {"alpha": alpha}) for alpha in (0.2, 0.05, 0.02, 0.01)),
    *(("theta", {"alpha": alpha, "span": 0.5}) for alpha in (0.1, 0.02)),
    *(("linear_trend", {"span": span}) for span in (200, 0.5)),
    *(("log_trend", {"span": span}) for span in (200, 0.25, 0.5, 1.0)),
)
AGES = (0.5, 1.0, 1.4, 2.0, 2.8, 4.0)  # of the back-test origins, in horizons
STRETCHES = 4  # a back-test's horizon is judged by the means of so many parts
MIN_PAST = 20  # rows below which nothing can be tried
STATE_ROWS = 120  # the rule of state.py needs 74 to tell
SHOWN = 5  # candidates named in the result; all of them count
TEMPERATURE = 0.02  # excess error at which a weight has fallen to 1/e


def auto(
    past: Past,
    step_Y: NDArray[Any],
    temperature: float = TEMPERATURE,
    stable_from: int | None = None,
) -> Prediction:
    """The candidates' average, weighted by a back-test on origins of the present state (transient
    or stable).

    Horizons are those of the forecast, or half the past if that is shorter. Recent origins count
    more. A past under MIN_PAST rows cannot be tried: the mean of all of it, with a note.

    Args:
        temperature: above 0; small takes the winner alone, large averages all.
        stable_from: the step from which the run is stable up to the origin, if the caller has asked
            `state.states`; None: asked here of the last STATE_ROWS rows, which is quick but cannot
            date a spell that is older.
    """
    if not temperature > 0:
        raise DataError(f"temperature {temperature}: must be above 0")
    rows = len(past.step_W)
    origins, horizon, state = _origins(past, int(past.rows_ahead(step_Y)[-1]), stable_from)
    if not origins:
        name = "window_mean"
        options = {"width": 1.0}
        share_YLE = LINES[name](past.step_W, **options).extend(past.step_W, past.share_WLE, step_Y)
        return Prediction(
            share_YLE,
            ((label(name, options), 1.0),),
            {"backtest": f"none, {rows} rows are too few"},
        )
    share_WX = past.share_WLE.reshape(rows, -1)
    # Up to a horizon ago an origin counts in full; what is older tells less of what comes.
    weight_B = np.array([min(1.0, horizon / (rows - origin)) for origin in origins])
    excess_BI = np.stack(
        [_excess(past.step_W, share_WX, origin, min(horizon, rows - origin)) for origin in origins]
    )
    excess_I = weight_B @ excess_BI / weight_B.sum()
    weight_I = np.exp(-(excess_I - excess_I.min()) / temperature)
    weight_I /= weight_I.sum()

    lines = [LINES[name](past.step_W, **options) for name, options in CANDIDATES]
    share_YX = _blend(lines, weight_I, past.step_W, share_WX, step_Y)
    heaviest = np.argsort(-weight_I, kind="stable")[:SHOWN]
    chosen = tuple(
        (label(*CANDIDATES[index]), round(float(weight_I[index]), 3)) for index in heaviest
    )
    notes = {
        "state": state,
        "backtest_origins": [int(past.step_W[origin]) for origin in sorted(origins)],
        "backtest_rows": horizon,
    }
    return Prediction(share_YX.reshape(len(step_Y), *past.share_WLE.shape[1:]), chosen, notes)


def _origins(past: Past, ahead: int, stable_from: int | None) -> tuple[list[int], int, str]:
    """Rows to stand at, the horizon in rows to look from there, and the present state."""
    rows = len(past.step_W)
    horizon = min(ahead, rows // 2)
    ages = sorted({round(age * horizon) for age in AGES} - {0})
    origins = [rows - age for age in ages if rows - age >= MIN_PAST]
    state = TRANSIENT
    if stable_from is None:
        stable_from, state = _stable_from(past)
    if stable_from is None:
        return origins, horizon, state
    stable = [origin for origin in origins if past.step_W[origin] >= stable_from]
    return (stable if len(stable) > 1 else origins), horizon, STABLE


def _stable_from(past: Past) -> tuple[int | None, str]:
    """The step from which the past's end is stable, None if it is not, and the state. A spell that
    fills the rows looked at is taken to be older than all origins: those before it weigh little,
    and the rule over a whole long past takes longer than the forecast.
    """
    tail = Trace(past.step_W[-STATE_ROWS:], past.trace.load_WLE[-STATE_ROWS:])
    found = states(tail)
    stable_from = found.stable_from
    filled = (
        stable_from is not None and stable_from <= tail.step_W[min(WINDOW, len(tail.step_W) - 1)]
    )
    return int(past.step_W[0]) if filled else stable_from, found.state


def _excess(
    step_W: NDArray[Any], share_WX: NDArray[Any], origin: int, horizon: int
) -> NDArray[np.float64]:
    """How much worse than the best candidate each is [I], 0.1 for a tenth: error of the stretches'
    mean shares, forecast from the rows before `origin`.
    """
    bounds = np.unique(
        np.linspace(origin, origin + horizon, min(horizon, STRETCHES) + 1).round().astype(int)
    )
    actual_YX = np.stack(
        [
            np.full(end - begin, 1 / (end - begin)) @ share_WX[begin:end]
            for begin, end in zip(bounds, bounds[1:])
        ]
    )
    middle_Y = (
        bounds[:-1] + bounds[1:] - 1
    ) // 2  # a line's mean over a stretch is its value in the middle
    past_W = step_W[:origin]
    lines = [LINES[name](past_W, **options) for name, options in CANDIDATES]
    level_IX = np.array([line.level_W for line in lines]) @ share_WX[:origin]
    tilted = [index for index, line in enumerate(lines) if line.slope_W is not None]
    slope_IX = np.array([lines[index].slope_W for index in tilted]) @ share_WX[:origin]
    error_I = np.zeros(len(lines))
    for actual_X, step in zip(actual_YX, step_W[middle_Y]):
        share_IX = level_IX.copy()
        ahead_I = np.array(
            [lines[index].ahead(int(past_W[-1]), np.asarray(step)) for index in tilted]
        )
        share_IX[tilted] += ahead_I[:, None] * slope_IX
        error_I += np.abs(np.maximum(share_IX, 0) - actual_X).mean(axis=1)
    least = float(error_I.min())
    return (
        error_I / least - 1 if least > 0 else (error_I > 0).astype(np.float64)
    )  # shares that never move: who hits them


def _blend(
    lines: list[Line],
    weight_I: NDArray[Any],
    step_W: NDArray[Any],
    share_WX: NDArray[Any],
    step_Y: NDArray[Any],
) -> NDArray[np.float64]:
    """The weighted mean of the lines [Y, X]: a level, and for each clock a slope."""
    weights_W = [weight_I @ np.stack([line.level_W for line in lines])]
    times_Y = [np.ones(len(step_Y))]
    for clock in dict.fromkeys(line.clock for line in lines if line.slope_W is not None):
        of_clock = [
            (weight, line.slope_W)
            for weight, line in zip(weight_I, lines)
            if line.slope_W is not None and line.clock is clock
        ]
        weights_W.append(np.sum([weight * slope_W for weight, slope_W in of_clock], axis=0))
        times_Y.append(clock(step_Y) - clock(step_W[-1:]))
    return np.asarray(np.stack(times_Y, axis=1) @ (np.stack(weights_W) @ share_WX))
