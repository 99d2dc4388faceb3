"""The report's table of where the wall time went."""

from __future__ import annotations

from pangu_locmoe.report.run import Run
from pangu_locmoe.report.series import duration, percent, text
from pangu_locmoe.report.tables import DASH, table_html
from pangu_locmoe.report.wall_time import WallTime

_PARTS = {
    "prepare": "Prepare",
    "compile": "Compile",
    "steps": "Steps",
    "evaluation": "Evaluation",
    "checkpoints": "Checkpoints",
    "lost": "Lost: steps done twice",
    "restarts": "Restarts: prepare and compile again",
    "down": "Down",
    "other": "Other",
    "observed": "All of it",
    "undisturbed": "Undisturbed run",
}


def wall_time_html(runs: list[Run]) -> str:
    """Parts of the wall time in rows, runs in columns; empty where no run has recorded it."""
    if not any(run.wall_time for run in runs):
        return ""
    rows = [[name, *(_part(run.wall_time, key) for run in runs)] for key, name in _PARTS.items()]
    for name, key in (
        ("Training overhead ratio", "training_overhead_ratio"),
        ("Starts", "starts"),
        ("Steps done twice", "steps_done_twice"),
    ):
        rows.append([name, *(_number(run.wall_time, key) for run in runs)])
    return table_html(["Wall time", *(run.name for run in runs)], rows)


def _part(time: WallTime | None, key: str) -> str:
    if time is None:
        return DASH
    seconds = getattr(time, key)
    return f"{duration(seconds)} ({percent(seconds / max(time.observed, 1e-9))})"


def _number(time: WallTime | None, key: str) -> str:
    return DASH if time is None else text(float(getattr(time, key)), 3)
