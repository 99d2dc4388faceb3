"""What the shares of a layer do in a sliding window, against what noise explains.

The state rule is built on it. NumPy only.

Four statistics, each over its limit, so that up to 1 is quiet:
  jump    how much neighbouring rows differ beyond multinomial sampling (root mean square), against UNLIKE of a share;
  spread  variance in the window, all experts together, against the variance that the differences of
  neighbours explain; drift   squared difference of the means of the window's halves, all experts
  together, against the same noise; range   max - min of each expert against its own noise.
Letters: W rows of one block, and the windows that end in them, L layers, E experts, X columns of
running sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.expert_load.trace import share

Array = NDArray[Any]

# rows that differ by more than this part of a share are no neighbours alike, however regular their
# irregularity is
UNLIKE = 0.4
SIGMAS = 3.0  # how far noise alone may carry a statistic of a quiet window


@dataclass(frozen=True)
class Block:
    """Statistics of the windows that end in each row of a block; NaN where there are too few rows
    for one.

    Attributes:
        statistic_WL: the largest of the four over its limit.
        noise_WL: step-to-step variance plus the tolerated one, all experts together, as a multiple
            of multinomial sampling.
        freedom_WL: independent directions of that noise, 1 to E - 1.
        all_share_WLE: shares of the rows kept from before, then of the block's.
    """

    statistic_WL: Array
    noise_WL: Array
    freedom_WL: Array
    all_share_WLE: Array


class Windows:
    """Slides a window over rows that come in blocks; how the rows are cut into blocks changes no
    bit of the result.

    Args:
        window: rows, 4 or more.
        tolerance: movement that counts as quiet, root mean square over the experts, as a fraction
            of a share.
        keep: rows of shares to keep, at least `window`.
    """

    def __init__(self, window: int, tolerance: float, keep: int) -> None:
        self._window = window
        self._tolerance = tolerance
        self._keep = keep
        self._all_share_WLE: Array | None = None
        self._sums_WLX: Array | None = None

    def push(self, load_WLE: Array) -> Block:
        """Take the next rows, at least one."""
        share_WLE = share(load_WLE)
        rows, layers, experts = share_WLE.shape
        if self._all_share_WLE is None or self._sums_WLX is None:
            self._all_share_WLE = share_WLE[:0]
            self._sums_WLX = np.zeros((1, layers, 2 * experts + 2))
        before_1LE = self._all_share_WLE[-1:] if len(self._all_share_WLE) else share_WLE[:1]
        square_WLE = np.diff(share_WLE, axis=0, prepend=before_1LE) ** 2
        centred_WLE = share_WLE - 1 / experts  # its squares sum up with less rounding
        inverse_WL1 = 1 / np.maximum(load_WLE.sum(axis=2, keepdims=True), 1)
        column_WLX = np.concatenate(
            [centred_WLE, square_WLE, (centred_WLE**2).sum(axis=2, keepdims=True), inverse_WL1],
            axis=2,
        )
        grown_WLX = np.cumsum(np.concatenate([self._sums_WLX[-1:], column_WLX]), axis=0)[1:]
        sums_WLX = np.concatenate([self._sums_WLX, grown_WLX])
        all_share_WLE = np.concatenate([self._all_share_WLE, share_WLE])
        found = np.full((3, rows, layers), np.nan)
        full = min(rows, len(all_share_WLE) - self._window + 1)  # windows that end in this block
        if full > 0:
            found[:, -full:] = self._statistics(
                sums_WLX[-self._window - full :], all_share_WLE[-self._window - full + 1 :]
            )
        self._all_share_WLE = all_share_WLE[-self._keep :]
        self._sums_WLX = sums_WLX[-self._window - 1 :]
        return Block(found[0], found[1], found[2], all_share_WLE)

    def _statistics(self, sums_WLX: Array, all_share_WLE: Array) -> tuple[Array, Array, Array]:
        window = self._window
        half = self._window // 2
        experts = all_share_WLE.shape[2]
        end_WLX = sums_WLX[window:]
        begin_WLX = sums_WLX[:-window]
        sum_WLX = end_WLX - begin_WLX
        mean_WLE = sum_WLX[..., :experts] / window
        variance_WL = (sum_WLX[..., -2] - window * (mean_WLE**2).sum(2)) / (window - 1)
        halves_WLE = (
            end_WLX - sums_WLX[window - half : -half] - sums_WLX[half : half - window] + begin_WLX
        )[..., :experts] / half
        step_WLE = (end_WLX - sums_WLX[1 : 1 - window])[..., experts : 2 * experts] / (
            2 * (window - 1)
        )
        inverse_WL = sum_WLX[..., -1] / window

        # Multinomial sampling has the covariance (diag(p) - p p') / N: its trace, and the
        # directions it spreads over.
        p_WLE = mean_WLE + 1 / experts
        square_WL = (p_WLE**2).sum(2)
        cube_WL = (p_WLE**3).sum(2)
        trace_WL = np.maximum(1 - square_WL, 1e-9)
        freedom_WL = trace_WL**2 / np.maximum(square_WL - 2 * cube_WL + square_WL**2, 1e-12)
        sampling_WL = trace_WL * inverse_WL
        # Tokens of one document go the same way, so real noise is larger: as large as neighbours
        # differ. Wander hardly enters that
        # difference. The part beyond sampling may move all experts together, along one direction.
        over_WL = np.maximum(step_WLE.sum(2) / sampling_WL, 1)
        noise_WL = over_WL * sampling_WL
        freedom_WL = np.maximum(
            1 / (1 / (over_WL**2 * np.maximum(freedom_WL, 1)) + (1 - 1 / over_WL) ** 2), 1
        )

        scale_WLE = np.maximum(
            p_WLE, 1 / experts
        )  # a movement of a small expert counts by the uniform share
        scale_WL = (scale_WLE**2).sum(2)
        slack_WL = self._tolerance**2 * scale_WL
        jump_WL = np.sqrt((noise_WL - sampling_WL) / scale_WL) / UNLIKE
        spread_WL = variance_WL / (noise_WL * tail((window - 1) * freedom_WL) + slack_WL)
        drift_WL = (halves_WLE**2).sum(2) / ((2 / half) * noise_WL * tail(freedom_WL) + slack_WL)
        # Of all pairs of rows and experts none differs by more (union bound over Bernstein's
        # inequality, whose second term is for rare experts).
        sampling_WLE = (over_WL * inverse_WL)[..., None] * p_WLE * (1 - p_WLE)
        own_WLE = np.maximum(step_WLE, sampling_WLE) + self._tolerance**2 * scale_WLE**2
        bound = np.log(window**2 * experts) + SIGMAS**2 / 2
        limit_WLE = 2 * np.sqrt(bound * own_WLE) + (bound / 3 * over_WL * inverse_WL)[..., None]
        range_WL = (
            (
                _sliding(np.maximum, all_share_WLE, window)
                - _sliding(np.minimum, all_share_WLE, window)
            )
            / limit_WLE
        ).max(2)
        statistic_WL = np.max([jump_WL, spread_WL, drift_WL, range_WL], axis=0)
        return statistic_WL, (noise_WL + slack_WL) / sampling_WL, freedom_WL


def tail(freedom: Any) -> Any:
    """chi-squared over its degrees of freedom, SIGMAS out: Wilson and Hilferty's cube."""
    return (1 - 2 / (9 * freedom) + SIGMAS * np.sqrt(2 / (9 * freedom))) ** 3


def _sliding(extreme: np.ufunc, values_W: Array, window: int) -> Array:
    """Maximum or minimum of each window, in log2(window) passes."""
    span = 1
    while 2 * span <= window:
        values_W = extreme(values_W[:-span], values_W[span:])
        span *= 2
    return np.asarray(
        extreme(values_W[: len(values_W) - (window - span)], values_W[window - span :])
    )
