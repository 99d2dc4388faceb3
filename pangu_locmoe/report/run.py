"""A run directory, read once into plain arrays.

Knows nothing of MindSpore, so a report can be made anywhere.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pangu_locmoe.data.identity import differences
from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.trace import Trace, read_trace
from pangu_locmoe.report.wall_time import WallTime, read_wall_time

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What one run left behind. Rows are sorted by step, every step once."""

    path: Path
    name: str
    config: dict[str, Any]
    config_text: str
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    events: list[dict[str, Any]]
    load: Trace | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    identity: dict[str, Any] | None = None
    """Of the data it was trained and measured on (data/identity.py); None where an older version
    did not record it.
    """
    wall_time: WallTime | None = None
    """None where an older version did not record it."""
    _columns: dict[str, Floats] = field(default_factory=dict, repr=False, compare=False)

    def column(self, key: str) -> Floats:
        """One value per training row; NaN where it is missing, null or not a number."""
        if (
            key not in self._columns
        ):  # a long run has 100,000 rows, and several charts want the same column
            self._columns[key] = np.array(
                [number(row.get(key)) for row in self.training], dtype=np.float64
            )
        return self._columns[key]

    @property
    def seconds(self) -> Floats:
        """Training time at each training row: step_seconds summed, each row standing for the
        steps since the row before.
        """
        step_W = self.column("step")
        seconds_W = np.nan_to_num(self.column("step_seconds"))
        if len(step_W) == 0:
            return step_W
        gap_W = np.diff(step_W, prepend=np.nan)
        gap_W[0] = np.median(gap_W[1:]) if len(step_W) > 1 and step_W[0] > 1 else 1
        return np.cumsum(seconds_W * gap_W)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains in the order in which the validation rows name them."""
        names: dict[str, None] = {}
        for row in self.validation:
            for key in ("bits_per_byte_by_domain", "validation_loss_by_domain"):
                names.update(dict.fromkeys(table(row, key)))
        return tuple(names)

    @property
    def final(self) -> dict[str, Any]:
        """The validation row at the end of the run, the latest one if the run is unfinished, or
        nothing.
        """
        return table(self.summary, "final") or (self.validation[-1] if self.validation else {})


def number(value: Any) -> float:
    """A finite or infinite float, or NaN for anything that is not a number. "Infinity" counts as
    one.
    """
    if value is None or isinstance(value, (bool, dict, list)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def table(row: dict[str, Any], key: str) -> dict[str, Any]:
    """row[key] if it is a mapping, else an empty one."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def read_run(path: str | Path) -> Run:
    """Read a run directory.

    A cut-off last line of metrics.jsonl is ignored, other damage becomes a note on the report.
    Raises DataError with one line if there is no config.yaml or metrics.jsonl, or they cannot be
    read.
    """
    path = Path(path)
    texts: dict[str, str] = {}
    if not path.is_dir():
        raise DataError(
            f"{path}: not a run directory: "
            + ("it is a file" if path.exists() else "it does not exist")
        )
    for name in ("config.yaml", "metrics.jsonl"):
        try:
            texts[name] = (path / name).read_text(
                encoding="utf-8", errors="strict" if name == "config.yaml" else "replace"
            )
        except FileNotFoundError:
            raise DataError(f"{path}: not a run directory: it has no {name}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path / name}: cannot be read: {error}") from None
    try:
        config = yaml.safe_load(texts["config.yaml"])
    except yaml.YAMLError as error:
        raise DataError(
            f"{path / 'config.yaml'}: not YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(config, dict):
        raise DataError(f"{path / 'config.yaml'}: must hold sections such as `model:` and `moe:`")
    notes: list[str] = []
    training, validation, events = _split(_rows(texts["metrics.jsonl"], notes))
    return Run(
        path=path,
        name=path.resolve().name,
        config=config,
        config_text=texts["config.yaml"],
        training=training,
        validation=validation,
        events=events,
        load=_read_load(path / "load.npz", notes),
        summary=_read_summary(path / "summary.json", notes),
        notes=tuple(notes),
        identity=_read_identity(path / "data.json"),
        wall_time=read_wall_time(path),
    )


def _rows(text: str, notes: list[str]) -> list[dict[str, Any]]:
    rows = []
    unreadable = []
    lines = text.split("\n")
    for index, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif index != len(
            lines
        ):  # the last line has no newline yet if the run was killed while it was written
            unreadable.append(index)
    if unreadable:
        notes.append(
            f"metrics.jsonl: {len(unreadable)} unreadable line(s) left out, the first is "
            f"line {unreadable[0]}"
        )
    return rows


def _split(
    rows: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows, validation rows and events; of two rows for the same step the later wins."""
    training: dict[float, dict[str, Any]] = {}
    validation: dict[float, dict[str, Any]] = {}
    events: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        step = number(row.get("step"))
        if "event" in row:
            events[str(row["event"]), 0.0 if math.isnan(step) else step] = row
        elif not math.isfinite(step):
            continue
        elif any(
            key in row for key in ("validation_loss", "bits_per_byte", "validation_loss_by_domain")
        ):
            validation[step] = row
        elif "loss" in row or "cross_entropy" in row:
            training[step] = row
    return (
        [training[k] for k in sorted(training)],
        [validation[k] for k in sorted(validation)],
        [events[k] for k in sorted(events, key=lambda k: k[1])],
    )


def _read_load(path: Path, notes: list[str]) -> Trace | None:
    if not path.exists():
        return None
    try:
        return read_trace(path)
    except DataError as error:
        notes.append(f"Expert load is not shown: {str(error).replace(str(path), path.name, 1)}")
        return None


def _read_identity(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        differences(values, values)  # raises for what is not an identity
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return dict(values)


def _read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        notes.append("The run is unfinished: there is no summary.json yet")
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"summary.json cannot be read: {error}")
        return {}
    return summary if isinstance(summary, dict) else {}
