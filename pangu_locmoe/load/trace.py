"""The load trace: how many tokens each expert got in each step. NumPy only.

One `.npz` with `step` int64 [rows], `load` int32 [rows, layers, experts] (before drops), `dropped` of the same shape and
`source` int32 [rows, layers, nodes, experts].
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np

from pangu_locmoe.errors import DataError
from pangu_locmoe.files import write_atomic


class TraceWriter:
    """Collects rows and writes the whole trace atomically at each `flush`.

    Args:
        path: load.npz; rows of an earlier part of the same run are taken over up to `last_step`.
        every: steps between rows.
        max_rows: no more rows than this; None: no limit.
        last_step: forget later rows of an existing file: a resumed run does those steps again.
    """

    def __init__(self, path: Path, every: int = 1, max_rows: int | None = None, last_step: int = 0) -> None:
        self._path, self._every, self._max_rows = path, every, max_rows
        self._steps: list[int] = []
        self._sources: list[np.ndarray] = []
        self._dropped: list[np.ndarray] = []
        if last_step > 0 and path.exists():
            trace = read_trace(path)
            kept = trace["step"] <= last_step
            self._steps = trace["step"][kept].tolist()
            self._sources, self._dropped = list(trace["source"][kept]), list(trace["dropped"][kept])

    def add(self, step: int, load_LNE: np.ndarray, dropped_LE: np.ndarray) -> None:
        """Take step `step` (from 1) if it is a step to trace."""
        full = self._max_rows is not None and len(self._steps) >= self._max_rows
        if not full and (step - 1) % self._every == 0:
            self._steps.append(step)
            self._sources.append(load_LNE.astype(np.int32))
            self._dropped.append(dropped_LE.astype(np.int32))

    def flush(self) -> None:
        """Write what there is. Raises OSError."""
        if not self._steps:
            return
        source = np.stack(self._sources)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            step=np.asarray(self._steps, dtype=np.int64),
            load=source.sum(axis=2, dtype=np.int32),
            dropped=np.stack(self._dropped),
            source=source,
        )
        write_atomic(self._path, buffer.getvalue())


def read_trace(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a trace by name. Raises DataError if it is not one."""
    try:
        with np.load(path) as archive:
            trace = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a load trace: {error}") from None
    if "step" not in trace or "load" not in trace or trace["load"].ndim != 3 or len(trace["load"]) != len(trace["step"]):
        raise DataError(f"{path}: not a load trace: needs step [rows] and load [rows, layers, experts]")
    return trace
