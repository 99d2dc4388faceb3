"""When the transient ends: a rule that tells for each layer whether expert load is in its transient
or its stable state. NumPy only.

The paper (arXiv 2404.16914) names the two states and their statistics, variance and range of a
share in a sliding window, but no rule. This one asks of the last W recorded rows: do the shares of
a layer move by more than their own step-to-step noise explains?
Letters: W rows (of a trace, a block, a window), L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.expert_load.windows import SIGMAS, UNLIKE, Windows, tail

Array = NDArray[Any]

# rows. The paper looks at 10 and 100: 10 are too few to tell wander from noise, 100 too many for a
# trace of 300 rows
WINDOW = 50
# wander and drift that count as quiet, of a share (of the uniform share for experts that have less)
TOLERANCE = 0.05
# hysteresis: a stable layer is transient again when a statistic is above this times its limit
EXIT = 2.0
# or when the step-to-step noise rises or falls by more than this factor; a fall says that what was
# before was irregular
CHANGE = 1.5
MEMORY = (
    10  # windows over which the usual noise is averaged, so that a slow change of it is no event
)
BLOCK = 5  # rows. Whether the spell had begun is told by single rows and by means over this many
STABLE = "stable"  # the last: too few rows to tell
TRANSIENT = "transient"
UNKNOWN = "unknown"
CELLS = 100_000  # shares handled at once: what stays in the processor's cache


@dataclass(frozen=True)
class Verdict:
    """What the rule says at one row, from this row and those before it.

    Attributes:
        step: of the row.
        layers_stable_from: for each layer the step at which its present stable spell began, or None
            if it is transient.
    """

    step: int
    layers_stable_from: tuple[int | None, ...]

    @property
    def stable_from(self) -> int | None:
        """The step from which on all layers are stable; None if one is transient."""
        steps = [step for step in self.layers_stable_from if step is not None]
        return max(steps) if steps and len(steps) == len(self.layers_stable_from) else None


class StateRule:
    """The rule, fed row by row while a run trains, or many rows at once; the verdict is the same,
    and never looks ahead.

    A layer becomes stable when `hold` windows in a row are quiet: no statistic of windows.py above
    its limit. It stays stable while none is above EXIT times its limit and the noise stays within a
    factor CHANGE of its mean over the spell. The spell began at the first row of the first of these
    windows, or after its last rows that were unlike the rest.

    Args:
        window: rows, 4 or more.
        tolerance: movement that counts as quiet, root mean square over the experts, as a fraction
            of a share.
        hold: quiet windows in a row that make a layer stable, 1 or more; None: half a window.

    Raises ValueError for other arguments.
    """

    def __init__(
        self, window: int = WINDOW, tolerance: float = TOLERANCE, hold: int | None = None
    ) -> None:
        self.window = window
        self.tolerance = tolerance
        self.hold = window // 2 if hold is None else hold
        if window < 4 or self.hold < 1 or not 0 <= tolerance < np.inf:
            raise ValueError(
                f"window {window} must be 4 or more, hold {self.hold} 1 or more, tolerance "
                f"{tolerance} 0 or more"
            )
        self._keep = window + self.hold
        self._windows = Windows(window, tolerance, self._keep)
        self._steps: list[int] = []  # of the rows that are kept
        self._shape: tuple[int, ...] | None = None  # layers, experts

    def update(self, step: int, load_LE: Array) -> Verdict:
        """Take the next row: tokens of each expert in step `step`.

        Raises ValueError for steps that do not rise or another shape.
        """
        self.extend(np.array([step]), np.asarray(load_LE)[None])
        return self.verdict()

    def extend(self, step_W: Array, load_WLE: Array) -> tuple[Array, Array]:
        """Take several rows; returns statistic_WL and stable_WL as in `States`.

        Raises ValueError as `update` does.
        """
        rows, *shape = load_WLE.shape
        if (np.diff(step_W, prepend=self._steps[-1:]) <= 0).any():
            raise ValueError("steps must rise")
        if self._shape not in (None, tuple(shape)):
            raise ValueError(f"load has shape {tuple(shape)}, the rows before have {self._shape}")
        if self._shape is None:
            self._shape = tuple(shape)
            self._run_L = np.zeros(
                shape[0], int
            )  # quiet windows in a row, and after `hold` all that were not above the exit limit
            self._from_L = np.zeros(shape[0], np.int64)  # step at which that run began
            self._noise_L = np.zeros(shape[0])  # its mean noise
        statistic_WL = np.full((rows, shape[0]), np.nan)
        stable_WL = np.zeros((rows, shape[0]), bool)
        size = max(1, CELLS // max(1, shape[0] * shape[1]))
        for start in range(0, rows, size):
            part = slice(start, start + size)
            statistic_WL[part], stable_WL[part] = self._block(step_W[part], load_WLE[part])
        return statistic_WL, stable_WL

    def verdict(self) -> Verdict:
        """What the rule says after the last row. Raises ValueError before the first."""
        if not self._steps:
            raise ValueError("no row yet")
        return Verdict(
            self._steps[-1],
            tuple(
                int(step) if run >= self.hold else None
                for step, run in zip(self._from_L, self._run_L)
            ),
        )

    def _block(self, step_W: Array, load_WLE: Array) -> tuple[Array, Array]:
        block = self._windows.push(load_WLE)
        before = len(self._steps)
        self._steps += step_W.tolist()
        stable_WL = np.zeros(block.statistic_WL.shape, bool)
        for row in range(max(0, self.window - 1 - before), len(step_W)):
            end = before + row + 1
            self._advance(
                block.statistic_WL[row],
                block.noise_WL[row],
                block.freedom_WL[row],
                self._steps[end - self.window],
            )
            stable_WL[row] = self._run_L >= self.hold
            for layer in np.flatnonzero(self._run_L == self.hold):
                begin = end - self.window - self.hold + 1
                self._from_L[layer] = self._steps[
                    begin
                    + self._onset(
                        block.all_share_WLE[begin:end, layer], block.freedom_WL[row, layer]
                    )
                ]
        self._steps = self._steps[-self._keep :]
        return block.statistic_WL, stable_WL

    def _advance(
        self, statistic_L: Array, noise_L: Array, freedom_L: Array, first_step: int
    ) -> None:
        """One row on; `first_step` is that of the first row of the window."""
        within_L = statistic_L <= np.where(self._run_L >= self.hold, EXIT, 1.0)
        change_L = CHANGE * tail(
            (self.window - 1) / 1.5 * freedom_L
        )  # 1.5: differences of neighbours are not independent
        alike_L = (noise_L <= change_L * self._noise_L) & (self._noise_L <= change_L * noise_L)
        goes_on_L = (self._run_L > 0) & within_L & alike_L
        begins_L = ~goes_on_L & (statistic_L <= 1)
        self._run_L = np.where(goes_on_L, self._run_L + 1, begins_L)
        self._from_L = np.where(begins_L, first_step, self._from_L)
        mean_L = self._noise_L + (noise_L - self._noise_L) / np.clip(
            self._run_L, 1, MEMORY * self.window
        )
        self._noise_L = np.where(begins_L, noise_L, mean_L)

    def _onset(self, share_WE: Array, freedom: float) -> int:
        """Which row of a layer's run begins the spell: a window may be quiet although its first
        rows are of the transient.

        `share_WE`: window + hold - 1 rows. Those of the first window that differ from the mean of
        the last are not of the spell. Where shares drift as fast as is tolerated this begins the
        spell up to half a window late; more slack would begin others too early.
        """
        recent_WE = share_WE[-self.window :]
        mean_E = recent_WE.mean(axis=0)
        noise = (np.diff(recent_WE, axis=0) ** 2).sum() / (2 * (self.window - 1))
        slack = self.tolerance**2 * (np.maximum(mean_E, 1 / len(mean_E)) ** 2).sum()
        sums_WE = np.cumsum(
            np.concatenate([np.zeros((1, len(mean_E))), share_WE[: self.window] - mean_E]), axis=0
        )
        onset = 0
        for rows in (1, BLOCK):
            distance_W = (((sums_WE[rows:] - sums_WE[:-rows]) / rows) ** 2).sum(axis=1)
            unlike = np.flatnonzero(distance_W > EXIT * tail(freedom) * noise / rows + slack)
            onset = max(onset, int(unlike[-1]) + 1 if len(unlike) else 0)
        return onset


@dataclass(frozen=True)
class States:
    """The verdicts over a trace.

    Attributes:
        stable_from: the first step from which all layers are stable up to the end of the trace;
            None if one is not stable there.
        layers_stable_from: the same of each layer. Whether a layer without is transient or unknown,
            `layer_states` says.
        window, hold, tolerance: as of `StateRule`: rows, windows, fraction of a share.
        stride: steps from row to row.
        step_W: int64, the rows' steps.
        stable_WL: bool, what was known at each row: a spell is known from its row window + hold - 1
            on.
        statistic_WL: float, the largest statistic over its limit; up to 1 is quiet. NaN before the
            first full window.
    """

    stable_from: int | None
    layers_stable_from: tuple[int | None, ...]
    window: int
    hold: int
    tolerance: float
    stride: int
    step_W: Array
    stable_WL: Array
    statistic_WL: Array

    @property
    def needed(self) -> int:
        """Rows below which nothing can be told."""
        return self.window + self.hold - 1

    @property
    def known(self) -> bool:
        """Whether there are rows enough to tell."""
        return len(self.step_W) >= self.needed

    @property
    def told(self) -> tuple[int | None, ...] | None:
        """layers_stable_from, or None where the trace is too short to tell."""
        return self.layers_stable_from if self.known else None

    @property
    def layer_states(self) -> tuple[str, ...]:
        """Of each layer at the end: "stable", "transient", or "unknown" where the trace is too
        short to tell.
        """
        return tuple(self._named(step) for step in self.layers_stable_from)

    @property
    def state(self) -> str:
        """Of the model: "stable" if all layers are."""
        return self._named(self.stable_from)

    def says(self, stable_from: int | None) -> str:
        """A verdict in words."""
        if not self.known:
            return "too short to tell"
        return "transient" if stable_from is None else f"stable from step {stable_from:,}"

    def _named(self, stable_from: int | None) -> str:
        if not self.known:
            return UNKNOWN
        return TRANSIENT if stable_from is None else STABLE

    def to_dict(self) -> dict[str, Any]:
        """The verdicts and the rule's parameters, for JSON."""
        rows = len(self.step_W)
        return {
            "state": self.state,
            "layer_states": list(self.layer_states),
            "stable_from": self.stable_from,
            "layers_stable_from": list(self.layers_stable_from),
            "window": self.window,
            "rule": {
                "hold": self.hold,
                "tolerance": self.tolerance,
                "unlike": UNLIKE,
                "sigmas": SIGMAS,
                "exit": EXIT,
                "change": CHANGE,
            },
            "steps": {
                "first": int(self.step_W[0]) if rows else None,
                "last": int(self.step_W[-1]) if rows else None,
                "rows": rows,
                "stride": self.stride,
            },
        }

    def format(self) -> str:
        """The verdicts as a few lines."""
        if not self.known:
            rows = len(self.step_W)
            return (
                f"too short to tell: {rows} row{'' if rows == 1 else 's'}, the rule needs "
                f"{self.needed}"
            )
        last = self.step_W[-1]
        head = (
            f"transient at the last step, {last}"
            if self.stable_from is None
            else f"stable from step {self.stable_from} of {last}"
        )
        texts = (
            "transient" if step is None else f"stable from step {step}"
            for step in self.layers_stable_from
        )
        layers = (f"  MoE layer {layer}: {text}" for layer, text in enumerate(texts))
        steps = "1 step" if self.stride == 1 else f"{self.stride} steps"
        rule = (
            f"window {self.window} rows of {steps}, tolerance {100 * self.tolerance:g} % of a share"
        )
        return "\n".join([head, *layers, rule])


def states(
    trace: Trace, window: int = WINDOW, tolerance: float = TOLERANCE, hold: int | None = None
) -> States:
    """`StateRule` run over a trace.

    Of fewer than window + hold - 1 rows nothing is known. Raises ValueError as StateRule does.
    """
    rule = StateRule(window, tolerance, hold)
    statistic_WL, stable_WL = rule.extend(trace.step_W, trace.load_WLE)
    last = rule.verdict() if len(trace.step_W) else Verdict(0, (None,) * trace.load_WLE.shape[1])
    return States(
        last.stable_from,
        last.layers_stable_from,
        window,
        rule.hold,
        tolerance,
        trace.stride,
        trace.step_W,
        stable_WL,
        statistic_WL,
    )
