"""What a start of a run spends its wall time on: the rows of time.jsonl (report/wall_time.py)."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Dict, Iterator, Optional

from pangu_locmoe.files import json_text
from pangu_locmoe.train.callbacks import Callback
from pangu_locmoe.train.metrics import Row
from pangu_locmoe.train.step import StepResult

_EVERY = 0.1
"""Seconds between rows, besides those at checkpoints: what a kill can leave unknown."""


class WallClock(Callback):
    """Counts from when it is made; `open` it where the rows are to be kept."""

    def __init__(self) -> None:
        self.end: Optional[str] = None
        """How the run ended (report/wall_time.py); None: it failed, or goes on."""
        self._step = 0
        self._at = time.time()
        self._started = self._written = time.perf_counter()
        self._file: Optional[IO[bytes]] = None
        self._seconds: Dict[str, float] = defaultdict(float)
        self._counts: Dict[str, int] = defaultdict(int)
        self._met: set[str] = set()

    def open(self, path: Path, step: int) -> None:
        """Everything so far was preparing, and comes first. Raises OSError."""
        self._file = path.open("a+b")
        if path.stat().st_size:
            self._file.seek(-1, 2)
            if self._file.read(1) != b"\n":  # a kill cut the last row off
                self._file.write(b"\n")
        self._step = step
        self._write_row({"start": self._at, "step": step})
        self._seconds["prepare"] += time.perf_counter() - self._started
        self._write()

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Around a step, an evaluation or a checkpoint."""
        began = time.perf_counter()
        yield
        # The first of a kind compiles.
        first = kind not in self._met and kind != "checkpoint"
        self._met.add(kind)
        name = f"first {kind}" if first else kind
        self._seconds[name] += time.perf_counter() - began
        self._counts[name] += 1

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        self._step = step
        if time.perf_counter() - self._written >= _EVERY:
            self._write()

    def on_saved(self, step: int) -> None:
        self._write()

    def close(self) -> None:
        if self._file is not None:
            try:
                self._write()
            finally:
                self._file.close()
                self._file = None

    def _write(self) -> None:
        """A row of what was done since the last one. Raises OSError."""
        assert self._file is not None
        self._written = time.perf_counter()
        row: Dict[str, Any] = {
            "step": self._step,
            "elapsed": self._written - self._started,
            "seconds": dict(self._seconds),
            "counts": dict(self._counts),
        }
        if self.end is not None:
            row["end"] = self.end
        self._seconds.clear()
        self._counts.clear()
        self._write_row(row)

    def _write_row(self, row: Dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json_text(row).encode("utf-8") + b"\n")
        self._file.flush()
