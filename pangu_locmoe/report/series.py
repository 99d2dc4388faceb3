"""Arrays on their way into a chart: smoothing, thinning, binning, and numbers as text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def window_of(count: int) -> int:
    """Rows in the moving mean of a series of `count` rows: a 40th of them, 1 for short series,
    always odd.
    """
    return 2 * (count // 80) + 1


def moving_mean(values: Floats, window: int) -> Floats:
    """Centred mean over `window` values, over fewer at the ends; values that are not finite are
    left out of it.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(finite & (count > 0), (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def thin(x: Floats, y: Floats, most: int) -> tuple[Floats, Floats]:
    """At most `most` points: the lowest and the highest of each of most/2 bins, so that no spike
    is lost.
    """
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most // 2 + 1).astype(int)
    keep: list[int] = []
    for start, end in zip(edges[:-1], edges[1:]):
        part = y[start:end]
        if np.isfinite(part).any():
            keep += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
        else:
            keep.append(int(start))
    return x[keep], y[keep]


def pick(x: Floats, y: Floats, most: int) -> tuple[Floats, Floats]:
    """At most `most` points, evenly spaced, first and last among them.

    For series that are smooth already.
    """
    if len(x) <= most:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, most).round().astype(int))
    return x[keep], y[keep]


def bin_rows(values_W: NDArray[Any], most: int) -> NDArray[Any]:
    """Sum the rows of the first axis into at most `most` bins of (nearly) equal size."""
    if len(values_W) <= most:
        return values_W
    edges = np.linspace(0, len(values_W), most + 1).astype(int)[:-1]
    return np.asarray(np.add.reduceat(values_W, edges, axis=0))


def tail(count: int) -> int:
    """How many of the last `count` rows speak for the end of a run: a tenth of them, 1 to 100."""
    return max(1, min(100, count // 10))


def last_mean(values: Floats) -> float:
    """Mean over the end of a run; NaN if nothing finite is there."""
    return _over_finite(np.mean, values[-tail(len(values)) :])


def median(values: Floats) -> float:
    """Median of what is finite; NaN if nothing is."""
    return _over_finite(np.median, values)


def _over_finite(function: Any, values: Floats) -> float:
    values = values[np.isfinite(values)]
    return float(function(values)) if len(values) else math.nan


def text(value: float, digits: int = 4) -> str:
    """A number for a reader: significant digits, thousands separated, a dash for NaN."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 2}e}"
    return f"{value:.{digits - 1 - math.floor(math.log10(abs(value)))}f}"


def percent(value: float) -> str:
    """0.1234 as 12.3 %."""
    return (
        "–"
        if math.isnan(value)
        else f"{100 * value:.3g} %"
        if abs(value) < 0.9995
        else f"{100 * value:.0f} %"
    )


def compact(value: float) -> str:
    """12_345_678 as 12.3 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return text(value)


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 20 s or 5 h 07 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
