"""Forecasts that are straight lines: a level and a slope, each a weighted sum of the past rows.

NumPy only.

Window means, exponential smoothing, drift, Theta and the trends differ only in the two weight
vectors and in the clock the slope runs on, so one method is one function from the steps of the past
to a `Line`, and `auto` can try many of them with one matrix product. W rows of the past, Y rows of
the future, L layers, E experts.

The weights of a level add up to 1 and those of a slope to 0, so the shares of a layer keep adding
up to 1 by themselves. A `span` says how much of the past counts: an int is rows, a float is that
part of the rows (0.25: the last quarter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Union

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError

Span = Union[int, float]
Clock = Callable[[NDArray[Any]], NDArray[np.float64]]


def linear_clock(step: NDArray[Any]) -> NDArray[np.float64]:
    """Time in steps."""
    return np.asarray(step, dtype=np.float64)


def log_clock(step: NDArray[Any]) -> NDArray[np.float64]:
    """Time in log steps: training changes as much from step 100 to 200 as from 1,000 to 2,000."""
    return np.log(np.maximum(step, 1).astype(np.float64))


@dataclass(frozen=True)
class Line:
    """share(step) = level . past + (clock(step) - clock(last past step)) * (slope . past).

    Attributes:
        level_W: float64, weights of the past rows, sum 1.
        slope_W: float64, weights, sum 0; None: flat.
        clock: what time the slope runs on.
    """

    level_W: NDArray[np.float64]
    slope_W: NDArray[np.float64] | None = None
    clock: Clock = linear_clock

    def ahead(self, last: int, step_Y: NDArray[Any]) -> NDArray[np.float64]:
        """Time from the last past step to the future ones [Y], on this line's clock."""
        return self.clock(step_Y) - self.clock(np.asarray(last))

    def extend(
        self, step_W: NDArray[Any], share_WLE: NDArray[Any], step_Y: NDArray[Any]
    ) -> NDArray[np.float64]:
        """The line at step_Y: float64 [Y, L, E], not yet clipped."""
        share_WX = share_WLE.reshape(len(step_W), -1)
        level_X = self.level_W @ share_WX
        if self.slope_W is None:
            share_YX = np.broadcast_to(level_X, (len(step_Y), len(level_X)))
        else:
            share_YX = np.outer(self.ahead(int(step_W[-1]), step_Y), self.slope_W @ share_WX)
            share_YX += level_X
        return share_YX.reshape(len(step_Y), *share_WLE.shape[1:])


def rows_of(span: Span, rows: int) -> int:
    """Rows a span covers of a past of `rows` rows, never more than there are.

    Raises DataError if it is no span.
    """
    if (
        isinstance(span, bool)
        or not isinstance(span, (int, float))
        or span <= 0
        or (isinstance(span, float) and span > 1)
    ):
        raise DataError(
            f"{span}: a span is a number of rows (10) or a part of the past above 0 and up "
            "to 1 (0.25)"
        )
    return min(rows, span if isinstance(span, int) else max(1, round(span * rows)))


def last(step_W: NDArray[Any]) -> Line:
    """The last row, for ever."""
    return Line(_window(len(step_W), 1))


def window_mean(step_W: NDArray[Any], width: Span = 100) -> Line:
    """The mean of the last `width` rows, for ever."""
    return Line(_window(len(step_W), rows_of(width, len(step_W))))


def ses(step_W: NDArray[Any], alpha: float = 0.05) -> Line:
    """Simple exponential smoothing: level = alpha * row + (1 - alpha) * level, begun at the
    first row.
    """
    return Line(_smoothing(len(step_W), alpha))


def drift(step_W: NDArray[Any]) -> Line:
    """From the last row on along the line through the first row and the last."""
    slope_W = np.zeros(len(step_W))
    slope_W[-1] = 1 / (step_W[-1] - step_W[0])
    slope_W[0] = -slope_W[-1]
    return Line(_window(len(step_W), 1), slope_W)


def theta(step_W: NDArray[Any], alpha: float = 0.05, span: Span = 0.5) -> Line:
    """The Theta method on recent data: mean of the trend line and of the smoothed series with
    doubled curvature.

    For lines theta = 0 and 2 that is exponential smoothing plus half the least-squares slope of the
    span.
    """
    return _tilt(step_W, _smoothing(len(step_W), alpha), span, 0.5, linear_clock)


def linear_trend(step_W: NDArray[Any], span: Span = 0.5, strength: float = 0.5) -> Line:
    """Least squares on the step over the span; `strength` 1 is the whole slope, 0 none (the
    span's mean).
    """
    return _tilt(
        step_W, _window(len(step_W), rows_of(span, len(step_W))), span, strength, linear_clock
    )


def log_trend(step_W: NDArray[Any], span: Span = 0.5, strength: float = 0.5) -> Line:
    """Least squares on log(step) over the span; `strength` 1 is the whole slope, 0 none (the
    span's mean).
    """
    return _tilt(
        step_W, _window(len(step_W), rows_of(span, len(step_W))), span, strength, log_clock
    )


def _window(rows: int, width: int) -> NDArray[np.float64]:
    weight_W = np.zeros(rows)
    weight_W[rows - width :] = 1 / width
    return weight_W


def _smoothing(rows: int, alpha: float) -> NDArray[np.float64]:
    if not 0 < alpha <= 1:
        raise DataError(f"alpha {alpha}: must be above 0 and at most 1")
    weight_W = alpha * (1 - alpha) ** np.arange(rows - 1, -1, -1.0)
    weight_W[0] += (1 - alpha) ** rows  # what the recursion leaves of its beginning
    return weight_W


def _tilt(
    step_W: NDArray[Any], level_W: NDArray[np.float64], span: Span, strength: float, clock: Clock
) -> Line:
    """A level, carried along `strength` times the least-squares slope of the span from where the
    level stands in time.
    """
    if not 0 <= strength <= 1:
        raise DataError(f"strength {strength}: must be from 0 (no trend) to 1 (the whole trend)")
    rows = max(2, rows_of(span, len(step_W)))
    time_W = clock(step_W)
    centred_X = time_W[-rows:] - time_W[-rows:].mean()
    slope_W = np.zeros(len(step_W))
    slope_W[-rows:] = (
        strength * centred_X / max(float(centred_X @ centred_X), np.finfo(np.float64).tiny)
    )
    return Line(level_W + (time_W[-1] - level_W @ time_W) * slope_W, slope_W, clock)


LINES: dict[str, Callable[..., Line]] = {
    line.__name__: line for line in (last, drift, window_mean, ses, theta, linear_trend, log_trend)
}
