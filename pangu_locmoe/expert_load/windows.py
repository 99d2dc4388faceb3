"""What the shares of a layer do in a sliding window, against what noise explains.

The state rule is built on it. NumPy only.

Four statistics, each over its limit, so that up to 1 is quiet:
  jump    how much neighbouring rows differ beyond multinomial sampling (root mean square), against UNLIKE of a share;
  spread  variance in the window, all experts together, against the variance that the differences of
  neighbours explain; drift   squared difference of the means of the window's halves, all experts
  together, against the same noise; range   max - min of each expert against its own noise.
Letters: R rows of one block, W window, L layers, E experts, C columns of running sums.
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
        statistic_RL: the largest of the four over its limit.
        noise_RL: step-to-step variance plus the tolerated one, all experts together, as a multiple
            of multinomial sampling.
        freedom_RL: independent directions of that noise, 1 to E - 1.
        share_QLE: shares of the rows kept from before, then of the block's.
    """

    statistic_RL: Array
    noise_RL: Array
    freedom_RL: Array
    share_QLE: Array


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
        self._share_QLE: Array | None = None
        self._sums_QLC: Array | None = None

    def push(self, load_RLE: Array) -> Block:
        """Take the next rows, at least one."""
        share_RLE = share(load_RLE)
        rows, layers, experts = share_RLE.shape
        if self._share_QLE is None or self._sums_QLC is None:
            self._share_QLE = share_RLE[:0]
            self._sums_QLC = np.zeros((1, layers, 2 * experts + 2))
        before_1LE = self._share_QLE[-1:] if len(self._share_QLE) else share_RLE[:1]
        square_RLE = np.diff(share_RLE, axis=0, prepend=before_1LE) ** 2
        centred_RLE = share_RLE - 1 / experts  # its squares sum up with less rounding
        inverse_RL1 = 1 / np.maximum(load_RLE.sum(axis=2, keepdims=True), 1)
        column_RLC = np.concatenate(
            [centred_RLE, square_RLE, (centred_RLE**2).sum(axis=2, keepdims=True), inverse_RL1],
            axis=2,
        )
        grown_RLC = np.cumsum(np.concatenate([self._sums_QLC[-1:], column_RLC]), axis=0)[1:]
        sums_QLC = np.concatenate([self._sums_QLC, grown_RLC])
        share_QLE = np.concatenate([self._share_QLE, share_RLE])
        found = np.full((3, rows, layers), np.nan)
        full = min(rows, len(share_QLE) - self._window + 1)  # windows that end in this block
        if full > 0:
            found[:, -full:] = self._statistics(
                sums_QLC[-self._window - full :], share_QLE[-self._window - full + 1 :]
            )
        self._share_QLE = share_QLE[-self._keep :]
        self._sums_QLC = sums_QLC[-self._window - 1 :]
        return Block(found[0], found[1], found[2], share_QLE)

    def _statistics(self, sums_QLC: Array, share_QLE: Array) -> tuple[Array, Array, Array]:
        window = self._window
        half = self._window // 2
        experts = share_QLE.shape[2]
        end_RLC = sums_QLC[window:]
        begin_RLC = sums_QLC[:-window]
        sum_RLC = end_RLC - begin_RLC
        mean_RLE = sum_RLC[..., :experts] / window
        variance_RL = (sum_RLC[..., -2] - window * (mean_RLE**2).sum(2)) / (window - 1)
        halves_RLE = (
            end_RLC - sums_QLC[window - half : -half] - sums_QLC[half : half - window] + begin_RLC
        )[..., :experts] / half
        step_RLE = (end_RLC - sums_QLC[1 : 1 - window])[..., experts : 2 * experts] / (
            2 * (window - 1)
        )
        inverse_RL = sum_RLC[..., -1] / window

        # Multinomial sampling has the covariance (diag(p) - p p') / N: its trace, and the
        # directions it spreads over.
        p_RLE = mean_RLE + 1 / experts
        square_RL = (p_RLE**2).sum(2)
        cube_RL = (p_RLE**3).sum(2)
        trace_RL = np.maximum(1 - square_RL, 1e-9)
        freedom_RL = trace_RL**2 / np.maximum(square_RL - 2 * cube_RL + square_RL**2, 1e-12)
        sampling_RL = trace_RL * inverse_RL
        # Tokens of one document go the same way, so real noise is larger: as large as neighbours
        # differ. Wander hardly enters that
        # difference. The part beyond sampling may move all experts together, along one direction.
        over_RL = np.maximum(step_RLE.sum(2) / sampling_RL, 1)
        noise_RL = over_RL * sampling_RL
        freedom_RL = np.maximum(
            1 / (1 / (over_RL**2 * np.maximum(freedom_RL, 1)) + (1 - 1 / over_RL) ** 2), 1
        )

        scale_RLE = np.maximum(
            p_RLE, 1 / experts
        )  # a movement of a small expert counts by the uniform share
        scale_RL = (scale_RLE**2).sum(2)
        slack_RL = self._tolerance**2 * scale_RL
        jump_RL = np.sqrt((noise_RL - sampling_RL) / scale_RL) / UNLIKE
        spread_RL = variance_RL / (noise_RL * tail((window - 1) * freedom_RL) + slack_RL)
        drift_RL = (halves_RLE**2).sum(2) / ((2 / half) * noise_RL * tail(freedom_RL) + slack_RL)
        # Of all pairs of rows and experts none differs by more (union bound over Bernstein's
        # inequality, whose second term is for rare experts).
        sampling_RLE = (over_RL * inverse_RL)[..., None] * p_RLE * (1 - p_RLE)
        own_RLE = np.maximum(step_RLE, sampling_RLE) + self._tolerance**2 * scale_RLE**2
        bound = np.log(window**2 * experts) + SIGMAS**2 / 2
        limit_RLE = 2 * np.sqrt(bound * own_RLE) + (bound / 3 * over_RL * inverse_RL)[..., None]
        range_RL = (
            (_sliding(np.maximum, share_QLE, window) - _sliding(np.minimum, share_QLE, window))
            / limit_RLE
        ).max(2)
        statistic_RL = np.max([jump_RL, spread_RL, drift_RL, range_RL], axis=0)
        return statistic_RL, (noise_RL + slack_RL) / sampling_RL, freedom_RL


def tail(freedom: Any) -> Any:
    """chi-squared over its degrees of freedom, SIGMAS out: Wilson and Hilferty's cube."""
    return (1 - 2 / (9 * freedom) + SIGMAS * np.sqrt(2 / (9 * freedom))) ** 3


def _sliding(extreme: np.ufunc, values_Q: Array, window: int) -> Array:
    """Maximum or minimum of each window, in log2(window) passes."""
    span = 1
    while 2 * span <= window:
        values_Q = extreme(values_Q[:-span], values_Q[span:])
        span *= 2
    return np.asarray(
        extreme(values_Q[: len(values_Q) - (window - span)], values_Q[window - span :])
    )
