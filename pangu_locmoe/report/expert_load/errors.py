"""The forecast section of a load report: a rolling back-test by method, horizon and state, and the
paper's figures beside it.

Only methods that take milliseconds are on the page; `pangu-locmoe load forecast` has the others.
"""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from pangu_locmoe.expert_load.forecast.score import backtest, table
from pangu_locmoe.expert_load.state import STABLE, TRANSIENT, UNKNOWN
from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.report.figures import STEP, Figure
from pangu_locmoe.report.plots import Line, line_chart
from pangu_locmoe.report.tables import DASH, table_html

METHODS = ("auto", "sw_avg", "last", "drift", "ses", "theta", "window_mean", "log_trend")
HORIZONS = (100, 500, 1000)
STATES = (TRANSIENT, STABLE, UNKNOWN)
MIN_PAST = 20  # rows before the first origin: with fewer, methods that look back do not differ
ORIGINS = 6  # of each horizon and state
# shares in a trace beyond which there are fewer origins: every forecast goes through all of them
CELLS = 2_000_000

# arXiv 2404.16914: model, steps ahead, then its LSTM, ARIMA(5,1,5) and SW_Avg, all in its stable
# state.
PAPER = (
    ("125M, 16 experts", 1000, "< 1 %", "0.5 %", "0.25 %"),
    ("350M, 128 experts", 1000, "< 10 %", "1.4 %", "1.3 %"),
    ("350M, 128 experts", 2000, DASH, DASH, "1.8 %"),
)

Case = dict[str, Any]


def rolling_cases(trace: Trace, stable_from: int | None, known: bool = True) -> list[Case]:
    """`backtest` from up to ORIGINS origins of each horizon and state; empty for a trace that is
    too short.
    """
    cases = []
    for horizon in HORIZONS:
        cases += backtest(
            trace,
            METHODS,
            [horizon],
            rolling_origins(trace, horizon, stable_from),
            stable_from,
            known,
        )
    return cases


def rolling_origins(trace: Trace, horizon: int, stable_from: int | None) -> list[int]:
    """Evenly spaced steps, as many in either state, from which MIN_PAST rows lie behind and the
    whole horizon ahead.
    """
    if len(trace.step_W) <= MIN_PAST or horizon < trace.stride:
        return []
    first = int(trace.step_W[MIN_PAST])
    last = int(trace.step_W[-1]) + trace.stride - horizon
    change = last + 1 if stable_from is None else min(max(stable_from, first), last + 1)
    most = max(1, min(ORIGINS, ORIGINS * CELLS // trace.load_WLE.size))
    parts = [
        np.linspace(low, high, most).round().astype(int)
        for low, high in ((first, change - 1), (change, last))
        if low <= high
    ]
    return sorted({int(origin) for part in parts for origin in part})


def errors_html(cases: list[Case], trace: Trace, says: str) -> str:
    """Tables of three errors, a chart, and the paper's figures; or why there are none."""
    name = (
        "<code>pangu-locmoe load forecast TRACE --origin STEP --horizon STEPS --method "
        "arima</code> (or <code>lstm</code>)"
    )
    slow = (
        "<p>ARIMA and the LSTM take seconds to minutes for each origin and are not on this "
        f"page; {name} prints their errors.</p>"
    )
    if not cases:
        return f"<p>No errors to show: {html.escape(_too_short(trace))}</p>{slow}{paper_html([])}"
    intro = (
        "<p>Rolling origins: at each, the rows before it are all a method sees, and the "
        "steps after it are compared with what came. States are "
        f"those of the rule with hindsight ({html.escape(says)}). Means over the origins; "
        "every layer weighs the same.</p>"
    )
    rows = table(cases)
    experts = trace.load_WLE.shape[2]
    parts = [
        _measure(
            "WAPE, %",
            "Sum of absolute errors over the sum of shares, step by step.",
            rows,
            "wape",
            100.0,
            100.0,
            3,
        ),
        _measure(
            "MAE, points",
            "Mean absolute error of a share, in percentage points.",
            rows,
            "mae_points",
            1.0,
            100.0 / experts,
            3,
        ),
        _measure(
            "WAPE of the mean over the horizon, %",
            "What a placement lives on: the noise of single steps is averaged out.",
            rows,
            "mean_wape",
            100.0,
            None,
            3,
        ),
    ]
    missing = [
        f"{horizon:,}"
        for horizon in HORIZONS
        if not any(case["horizon"] == horizon for case in cases)
    ]
    short = (
        (
            f"<p>Horizons of {' and '.join(missing)} steps are not shown: "
            f"{html.escape(_too_short(trace))}</p>"
        )
        if missing
        else ""
    )
    return (
        intro
        + "".join(parts)
        + short
        + slow
        + f'<div class="figures">{origin_figure(cases).html()}</div>'
        + paper_html(rows)
    )


def origin_figure(cases: list[Case]) -> Figure:
    """WAPE from every origin over the shortest horizon."""
    horizon = min(case["horizon"] for case in cases)
    title = f"Error of {horizon} steps, by origin"
    lines = []
    for colour, method in enumerate(METHODS):
        own = [case for case in cases if case["method"] == method and case["horizon"] == horizon]
        origin, wape = (np.array([case[key] for case in own], float) for key in ("origin", "wape"))
        lines.append(Line(method, origin, np.asarray(100 * wape, np.float64), colour, "line"))
    svg = line_chart(title, STEP + " of the origin", "WAPE (%)", lines, from_zero=True)
    return Figure(
        title,
        svg,
        "Lower is better.",
        tuple((method, colour) for colour, method in enumerate(METHODS)),
    )


def paper_html(rows: list[dict[str, Any]]) -> str:
    """The paper's errors, and ours of the same predictors and horizons under the name of the
    measure.
    """
    lines = [
        [model, f"{steps:,}", "mean error ratio per MoE layer", lstm, arima, average]
        for model, steps, lstm, arima, average in PAPER
    ]
    for horizon in HORIZONS:
        for key, name, scale, unit in (
            ("mean_wape", "WAPE of the mean", 100.0, " %"),
            ("wape", "WAPE, step by step", 100.0, " %"),
            ("mae_points", "MAE", 1.0, " points"),
        ):
            value = _find(rows, "sw_avg", horizon, "stable", key)
            if value is not None:
                lines.append(
                    [
                        "this trace, stable",
                        f"{horizon:,}",
                        name,
                        DASH,
                        DASH,
                        f"{_digits(scale * value, 3)}{unit}",
                    ]
                )
    ours = (
        "Beside them stand three of ours: the error of the mean over the horizon, which "
        "the number of tokens in a step hardly touches, the error step by "
        "step, which has a sampling floor, and points, which shrink with the number of experts."
        if len(lines) > len(PAPER)
        else "This trace has no forecasts from its stable state to put beside them."
    )
    text = (
        "<p>Errors in the paper’s (arXiv 2404.16914) stable state. It names its measure "
        "only “mean error ratio per MoE layer”, without a formula, and gives no "
        "window for SW_Avg; models, data and batches are others, too. The figures cannot "
        f"be compared exactly. {ours}</p>"
    )
    return (
        "<h3>The paper’s figures</h3>"
        + text
        + table_html(["Model", "Steps ahead", "Measure", "LSTM", "ARIMA(5,1,5)", "SW_Avg"], lines)
    )


def _measure(
    title: str,
    says: str,
    rows: list[dict[str, Any]],
    key: str,
    scale: float,
    floor: float | None,
    digits: int,
) -> str:
    """A table of one measure: methods in rows, horizon and state in columns; the floors of
    `errors` in the last rows where it has them.
    """
    columns = [
        (horizon, state)
        for horizon in HORIZONS
        for state in STATES
        if _find(rows, METHODS[0], horizon, state, key) is not None
    ]
    lines = [
        [method, *(_cell(rows, method, *column, key, scale, digits) for column in columns)]
        for method in METHODS
    ]
    if floor is not None:
        for name, measure in (
            ("best constant, in hindsight", "hindsight_wape"),
            ("sampling alone", "sampling_wape"),
        ):
            lines.append(
                [
                    name,
                    *(
                        _cell(rows, METHODS[0], *column, measure, floor, digits)
                        for column in columns
                    ),
                ]
            )
    counts = [
        next(row["origins"] for row in rows if (row["horizon"], row["state"]) == column)
        for column in columns
    ]
    lines.append(["origins", *(str(count) for count in counts)])
    header = ["Method", *(f"{horizon:,} steps, {state}" for horizon, state in columns)]
    return f"<h3>{html.escape(title)}</h3><p>{html.escape(says)}</p>{table_html(header, lines)}"


def _cell(
    rows: list[dict[str, Any]],
    method: str,
    horizon: int,
    state: str,
    key: str,
    scale: float,
    digits: int,
) -> str:
    value = _find(rows, method, horizon, state, key)
    return DASH if value is None else _digits(scale * value, digits)


def _digits(value: float, digits: int) -> str:
    """Significant digits without an exponent, 0.0312 and 31.2."""
    return (
        f"{value:.{max(0, digits - 1 - int(np.floor(np.log10(value))))}f}" if value > 1e-9 else "0"
    )


def _find(
    rows: list[dict[str, Any]], method: str, horizon: int, state: str, key: str
) -> float | None:
    return next(
        (
            row[key]
            for row in rows
            if (row["method"], row["horizon"], row["state"]) == (method, horizon, state)
        ),
        None,
    )


def _too_short(trace: Trace) -> str:
    stride = trace.stride
    covered = int(trace.step_W[-1]) - int(trace.step_W[0]) + stride
    wide = f", one row every {stride:,}" if stride > 1 else ""
    return (
        f"the trace covers {covered:,} steps{wide}; a horizon needs {MIN_PAST} rows before it, "
        "itself covered to the end, and at least one row of its own."
    )
