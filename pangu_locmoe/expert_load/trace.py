"""The load trace: how many tokens each expert got in each step. NumPy only.

One `.npz` with `step` int64 [rows], `load` int [rows, layers, experts] (before drops) and where
known `dropped` of the same shape and `source` int [rows, layers, nodes, experts].
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError, one_line
from pangu_locmoe.files import write_atomic

FLUSH_SECONDS = 30.0  # what a run that is killed may lose
FLUSH_FRACTION = 0.05  # of the time, at most, goes into writing between checkpoints
LARGEST = 2**48  # tokens or steps; sums over any layer then fit in int64

_FIELDS = {"step": "step_W", "load": "load_WLE", "dropped": "dropped_WLE", "source": "source_WLNE"}


@dataclass(frozen=True)
class Trace:
    """Tokens of every expert over a run. W rows, L sparse layers, N nodes, E experts.

    Attributes:
        step_W: int64, rising; the steps the rows are of. Steps between two rows were not recorded.
        load_WLE: int, tokens routed to each expert in that step, before drops.
        dropped_WLE: int or None, tokens dropped.
        source_WLNE: int or None, the same tokens by the node they came from.
    """

    step_W: NDArray[Any]
    load_WLE: NDArray[Any]
    dropped_WLE: NDArray[Any] | None = None
    source_WLNE: NDArray[Any] | None = None

    @property
    def share_WLE(self) -> NDArray[np.float64]:
        """Each expert's share of its layer's tokens; 1/E where a layer had none."""
        return share(self.load_WLE)

    @property
    def stride(self) -> int:
        """Steps from one row to the next: the median, 1 for fewer than two rows."""
        return max(1, round(float(np.median(np.diff(self.step_W))))) if len(self.step_W) > 1 else 1

    def between(self, first: int, end: int) -> Trace:
        """The rows of steps first <= step < end."""
        low, high = np.searchsorted(self.step_W, (first, end))
        parts = (
            None if array is None else array[low:high]
            for array in (self.step_W, self.load_WLE, self.dropped_WLE, self.source_WLNE)
        )
        return Trace(*parts)  # type: ignore[arg-type]


def share(load_XE: NDArray[Any]) -> NDArray[np.float64]:
    """Counts [..., E] as shares of their sum over the last axis; 1/E where that is 0."""
    total_X1 = load_XE.sum(axis=-1, keepdims=True).astype(np.float64)
    return np.divide(
        load_XE, total_X1, out=np.full(load_XE.shape, 1 / load_XE.shape[-1]), where=total_X1 > 0
    )


class TraceWriter:
    """Collects rows in growing arrays and writes the whole trace atomically.

    A run that is killed keeps what was written last: `add` writes once FLUSH_SECONDS have passed,
    or more where writing takes longer than FLUSH_FRACTION of them, so that rewriting the file costs
    a bounded part of the run however long it gets; and with the last row.

    Args:
        path: load.npz; rows of an earlier part of the same run are taken over up to `last_step`.
        every: steps between rows.
        max_rows: no more rows than this; None: no limit.
        last_step: forget later rows of an existing file: a resumed run does those steps again.
        clock: seconds.

    Raises DataError if there is a file to go on from that is not a trace.
    """

    def __init__(
        self,
        path: Path,
        every: int = 1,
        max_rows: int | None = None,
        last_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._every = every
        self._max_rows = max_rows
        self._clock = clock
        self._rows = 0
        self._arrays: list[NDArray[Any]] = [
            np.zeros(0, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, np.int32),
        ]  # step, source, dropped
        self._due = clock() + FLUSH_SECONDS
        if last_step > 0 and path.exists():
            trace = read_trace(path).between(0, last_step + 1)
            if trace.source_WLNE is None or trace.dropped_WLE is None:
                raise DataError(f"{path}: not the trace of a run: it has no source or no dropped")
            self._rows = len(trace.step_W)
            self._arrays = [
                trace.step_W,
                trace.source_WLNE.astype(np.int32),
                trace.dropped_WLE.astype(np.int32),
            ]

    def add(self, step: int, load_LNE: NDArray[Any], dropped_LE: NDArray[Any]) -> None:
        """Take step `step` (from 1) if it is a step to trace.

        Raises OSError if it is time to write and that fails.
        """
        full = self._max_rows is not None and self._rows >= self._max_rows
        if full or (step - 1) % self._every != 0:
            return
        row: list[Any] = [step, load_LNE, dropped_LE]
        if self._rows == len(self._arrays[0]):
            self._arrays = [
                _doubled(array, np.shape(value)) for array, value in zip(self._arrays, row)
            ]
        for array, value in zip(self._arrays, row):
            array[self._rows] = value
        self._rows += 1
        if self._clock() >= self._due or self._rows == self._max_rows:
            self.flush()

    @property
    def trace(self) -> Trace:
        """What there is."""
        step_W, source_WLNE, dropped_WLE = (array[: self._rows] for array in self._arrays)
        return Trace(step_W, source_WLNE.sum(axis=2, dtype=np.int32), dropped_WLE, source_WLNE)

    def flush(self) -> None:
        """Write what there is. Raises OSError."""
        if not self._rows:
            return
        began = self._clock()
        write_trace(self._path, self.trace)
        ended = self._clock()
        self._due = ended + max(FLUSH_SECONDS, (ended - began) / FLUSH_FRACTION)


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace; a reader sees the old file or the new one. Raises OSError."""
    arrays = {
        name: getattr(trace, field)
        for name, field in _FIELDS.items()
        if getattr(trace, field) is not None
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def read_trace(path: Path) -> Trace:
    """Read a trace file, or a run directory's; counts that were written as floats come back as
    integers.

    Raises:
        DataError: it is anything else; one line.
    """
    path = path / "load.npz" if path.is_dir() else path
    try:
        return _checked(_arrays(path))
    except DataError as error:
        raise DataError(f"{path}: not a load trace: {error}") from None


def _doubled(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    grown = np.zeros((max(64, 2 * len(array)), *shape), array.dtype)
    if len(array):
        grown[: len(array)] = array
    return grown


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise DataError("it is a folder" if path.exists() else "it does not exist")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError("one array, not an .npz of several")
        with archive:
            found = {name: archive[name] for name in _FIELDS if name in archive.files}
        for name, array in found.items():
            if not isinstance(array, np.ndarray):
                raise DataError(f"{name} is not an array")
        return found
    except DataError:
        raise
    # a damaged archive can make the zip reader, zlib and the header parser raise almost anything
    except Exception as error:
        raise DataError(one_line(error)) from None


def _checked(arrays: dict[str, NDArray[Any]]) -> Trace:
    shapes = {name: array.shape for name, array in arrays.items()}
    load = shapes.get("load", ())
    step = shapes.get("step", ())
    if len(load) != 3 or step != load[:1]:
        raise DataError(
            f"needs step [rows] and load [rows, layers, experts], has {_listed(shapes)}"
        )
    if 0 in load:
        raise DataError(f"load is empty: it has shape {load}")
    if shapes.get("dropped", load) != load:
        raise DataError(f"dropped has shape {shapes['dropped']}, load has {load}")
    source = shapes.get("source")
    if source is not None and (len(source) != 4 or source[:2] + source[3:] != load):
        raise DataError(
            f"source has shape {source}, load has {load}; expected [rows, layers, nodes, experts]"
        )
    counts = {name: whole_counts(name, array) for name, array in arrays.items()}
    if (np.diff(counts["step"]) <= 0).any():
        raise DataError("steps do not rise")
    if source is not None and (counts["source"].sum(axis=2) != counts["load"]).any():
        raise DataError("source, summed over nodes, is not load")
    return Trace(
        counts["step"].astype(np.int64), counts["load"], counts.get("dropped"), counts.get("source")
    )


def whole_counts(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """The array as it is if its type is a signed integer of 32 or 64 bits, else as int64."""
    if array.dtype.kind not in "iuf":
        raise DataError(f"{name} holds {array.dtype}, not counts")
    if not np.isfinite(array).all() or (array != np.floor(array)).any():
        raise DataError(f"{name} holds numbers that are not whole")
    if array.min() < 0 or array.max() > LARGEST:
        raise DataError(
            f"{name} holds a number {'below 0' if array.min() < 0 else f'above {LARGEST}'}"
        )
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "neither"
