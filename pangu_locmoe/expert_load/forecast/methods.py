"""The methods by name.

A new straight-line method is one function in lines.py; any other is one function here.

A method takes the past, the future steps [Y] and its options, and returns a `Prediction`; its
keyword parameters are the options a user may set.
"""

from __future__ import annotations

import inspect
from collections import deque
from difflib import get_close_matches
from typing import Any, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.forecast.auto import auto
from pangu_locmoe.expert_load.forecast.lines import LINES, Span, rows_of
from pangu_locmoe.expert_load.forecast.past import Past, Prediction
from pangu_locmoe.expert_load.forecast.spec import parse
from pangu_locmoe.expert_load.trace import Trace


def sw_avg(past: Past, step_Y: NDArray[Any], window: Span = 100) -> Prediction:
    """The paper's SW_Avg: the mean of the last w shares is the next one; push it into the window
    and repeat, k times.

    Iterated, it settles at the mean of the window weighted 1, 2, ..., w, the newest most. The paper
    gives no w.
    """
    width = rows_of(window, len(past.step_W))
    rows_Y = past.rows_ahead(step_Y)
    kept = deque(past.share_WLE[-width:])
    sum_LE = past.share_WLE[-width:].sum(axis=0)
    next_YLE = np.empty((int(rows_Y[-1]), *sum_LE.shape))
    for next_LE in next_YLE:
        np.divide(sum_LE, width, out=next_LE)
        kept.append(next_LE)
        sum_LE = sum_LE + next_LE - kept.popleft()
    notes = (
        {"window": f"{window} shortened to the {width} rows there are"}
        if isinstance(window, int) and width < window
        else {}
    )
    return Prediction(next_YLE[rows_Y - 1], notes=notes)


def combination(
    past: Past,
    step_Y: NDArray[Any],
    of: Sequence[str] = ("window_mean", "ses(alpha=0.02)", "theta", "log_trend"),
) -> Prediction:
    """The plain mean of several methods' shares.

    Raises DataError for an empty list or an unknown method.
    """
    if isinstance(of, str) or not of:
        raise DataError(f"combination of {of!r}: name one method or more in a list")
    shares = [normalised(predict(method, past, step_Y).share_YLE) for method in of]
    return Prediction(
        np.mean(shares, axis=0), tuple((method, round(1 / len(of), 3)) for method in of)
    )


def arima(
    past: Past,
    step_Y: NDArray[Any],
    order: Sequence[int] = (5, 1, 5),
    jobs: int | None = None,
    progress: bool = False,
) -> Prediction:
    """The paper's ARIMA, one model per expert and layer; see arima.py.

    Raises DataError without the extra.
    """
    try:
        from pangu_locmoe.expert_load.forecast.arima import predict_arima
    except ImportError as error:
        raise DataError(
            f"forecast with arima: {error}; pip install 'pangu_locmoe[forecast]'"
        ) from None
    return predict_arima(past, step_Y, order, jobs, progress)


def lstm(
    past: Past,
    step_Y: NDArray[Any],
    window: int = 256,
    hidden: int = 64,
    updates: int = 200,
    seed: int = 1,
    train_on: Trace | None = None,
) -> Prediction:
    """The paper's LSTM, one network over all layers; see lstm.py.

    Raises DataError without MindSpore.
    """
    try:
        from pangu_locmoe.expert_load.forecast.lstm import predict_lstm
    except ImportError as error:
        raise DataError(
            f"forecast with lstm: {error}; it needs MindSpore: pip install 'mindspore>=2.9,<2.11'"
        ) from None
    return predict_lstm(past, step_Y, window, hidden, updates, seed, train_on)


METHODS: dict[str, Callable[..., Any]] = {
    "auto": auto,
    **LINES,
    **{method.__name__: method for method in (sw_avg, combination, arima, lstm)},
}


def predict(
    method: str, past: Past, step_Y: NDArray[Any], options: dict[str, Any] | None = None
) -> Prediction:
    """Run a method, `name` or `name(option=value)`, with further options.

    Raises DataError for a wrong name or option.
    """
    name, own = parse(method)
    options = {**own, **(options or {})}
    if name not in METHODS:
        raise DataError(f"method {name!r}: {_nearest(name, list(METHODS))}")
    allowed = options_of(name)
    for option in options:
        if option not in allowed:
            raise DataError(f"{name} has no option {option!r}: {_nearest(option, allowed)}")
    try:
        if name in LINES:
            return Prediction(
                LINES[name](past.step_W, **options).extend(past.step_W, past.share_WLE, step_Y)
            )
        prediction: Prediction = METHODS[name](past, step_Y, **options)
        return prediction
    except (TypeError, ValueError) as error:
        values = ", ".join(
            f"{key}={value!r}" for key, value in options.items() if not isinstance(value, Trace)
        )
        if not values:
            raise
        raise DataError(f"{name}({values}): {error}") from error


def options_of(name: str) -> list[str]:
    """The options a user may set for a method."""
    return [
        key
        for key in inspect.signature(METHODS[name]).parameters
        if key not in ("past", "step_Y", "step_W")
    ]


def normalised(share_YLE: NDArray[Any]) -> NDArray[np.float64]:
    """Clipped at 0, each layer summing to 1; a layer left with nothing is uniform."""
    clipped_YLE = np.maximum(share_YLE, 0, dtype=np.float64)
    total_YL = clipped_YLE @ np.ones(clipped_YLE.shape[2])
    if not total_YL.all():
        clipped_YLE[total_YL == 0] = 1
        total_YL = clipped_YLE.sum(axis=2)
    clipped_YLE /= total_YL[:, :, None]
    return clipped_YLE


def _nearest(name: str, allowed: list[str]) -> str:
    near = get_close_matches(name, allowed, 1)
    return (
        f"did you mean {near[0]}?"
        if near
        else f"choose one of {', '.join(allowed)}"
        if allowed
        else "it takes none"
    )
