"""What a forecast may look at, and what a method gives back. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.trace import Trace

MIN_ROWS = 2  # a slope needs two


@dataclass(frozen=True)
class Past:
    """The rows before the origin; nothing later can be reached from here.

    W rows, L layers, E experts.

    Attributes:
        trace: those rows as recorded.
        share_WLE: float64, their shares, computed once.
    """

    trace: Trace
    share_WLE: NDArray[np.float64]

    @classmethod
    def of(cls, trace: Trace, origin: int) -> Past:
        """The rows with step < origin. Raises DataError if they are too few or of no expert."""
        rows = int(np.searchsorted(trace.step_W, origin))
        if rows < MIN_ROWS:
            first = (
                f"the trace begins at step {trace.step_W[0]}"
                if len(trace.step_W)
                else "the trace is empty"
            )
            raise DataError(
                f"origin {origin}: a forecast needs {MIN_ROWS} rows before it, there are "
                f"{rows}; {first}"
            )
        if 0 in trace.load_WLE.shape:
            raise DataError(
                f"the trace has {trace.load_WLE.shape[1]} sparse layers of "
                f"{trace.load_WLE.shape[2]} experts: nothing to forecast"
            )
        before = trace.between(int(trace.step_W[0]), origin)
        return cls(before, before.share_WLE)

    @property
    def step_W(self) -> NDArray[Any]:
        """The rows' steps."""
        return self.trace.step_W

    @property
    def stride(self) -> int:
        """Steps from one row to the next."""
        return self.trace.stride

    def future(self, origin: int, horizon: int) -> NDArray[np.int64]:
        """int64 [Y]: the steps >= origin and < origin + horizon that the trace will record if it
        goes on as it did, last row + stride, + 2 strides, ... Raises DataError if there is none.
        """
        if horizon < self.stride:
            raise DataError(
                f"horizon {horizon}: must be at least {self.stride}, the steps from one "
                "row of the trace to the next"
            )
        last = int(self.step_W[-1])
        first = last + self.stride * -((last - origin) // self.stride)
        return np.arange(first, origin + horizon, self.stride, dtype=np.int64)

    def rows_ahead(self, step_Y: NDArray[Any]) -> NDArray[np.int64]:
        """int64 [Y]: how many rows after the last one each future step is, from 1."""
        return np.asarray((step_Y - self.step_W[-1]) // self.stride, dtype=np.int64)


class Prediction(NamedTuple):
    """What a method returns.

    Attributes:
        share_YLE: float [Y, L, E]; `forecast` clips it at 0 and makes each layer sum to 1.
        chosen: what `auto` weighed, the heaviest first: (method as it can be typed, weight).
        notes: what the user should know, JSON-able.
    """

    share_YLE: NDArray[Any]
    chosen: tuple[tuple[str, float], ...] = ()
    notes: dict[str, Any] = {}  # noqa: RUF012  (a NamedTuple's default; nobody writes into it)
