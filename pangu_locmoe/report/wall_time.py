"""Where a run's wall time went, over all its starts, from the rows of time.jsonl.

A *start* is one process, or job, that trains the run for a while. It writes a row with `start` (when,
in seconds of the epoch), and then rows of what it has done since the row before: `step`, the last
step done, `elapsed`, seconds since the start, `seconds` and `counts` of each kind of work. A row
stands at the end of every checkpoint, so that what a restart does again begins exactly behind one.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Iterable, Iterator, Optional

TIME_FILE = "time.jsonl"
STOPPED = "stopped"
FINISHED = "finished"
"""How a start ended, in its last row; without, it failed or was killed."""
Sums = dict[str, float]
"""By kind of work."""


@dataclass(frozen=True)
class WallTime:
    """Seconds; the first nine add up to `observed`."""

    prepare: float
    """Of the first start: text, model, everything before its first step."""
    compile: float
    """Of the first start: its first step and evaluation, less what they take later."""
    steps: float
    evaluation: float
    checkpoints: float
    lost: float
    """What was done after the checkpoint that a restart went on from, and so was done twice."""
    restarts: float
    """Preparing and compiling again, by the starts after the first."""
    down: float
    """From the last that is known of a start that failed or was killed to the next one."""
    other: float
    """Metrics, policies, samples."""
    observed: float
    """T_obs: all starts, and what was down between them. A pause after a stop with a saved state
    is no part of it.
    """
    undisturbed: float
    """T_opt: observed less checkpoints, lost, restarts and down."""
    training_overhead_ratio: float
    """undisturbed / observed (Lu et al., arXiv 2408.07482: TOR = T_opt / T_obs)."""
    starts: int
    steps_done_twice: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Start:
    at: float
    step: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def elapsed(self) -> float:
        return float(self.rows[-1]["elapsed"]) if self.rows else 0.0

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else self.step

    @property
    def end(self) -> Optional[str]:
        return self.rows[-1].get("end") if self.rows else None


def read_wall_time(run_dir: Path) -> Optional[WallTime]:
    """Of a run directory; None where it has no time.jsonl, because an older version wrote it."""
    try:
        lines = (run_dir / TIME_FILE).read_bytes().splitlines()
    except OSError:
        return None
    starts = list(_starts(_rows(lines)))
    return wall_time(starts) if starts else None


def wall_time(starts: list[_Start]) -> WallTime:
    """Adds up the starts of a run."""
    kept = [_kept(start, starts[number + 1 :]) for number, start in enumerate(starts)]
    own = [_sums(rows, "seconds") for rows in kept]
    all_rows = [row for rows in kept for row in rows]
    total = _sums(all_rows, "seconds")
    compiling = {kind: _compiling(kind, own, all_rows) for kind in ("step", "evaluation")}
    compile_first = sum(seconds[0] for seconds in compiling.values())
    restarts = total["prepare"] - own[0]["prepare"]
    restarts += sum(map(sum, compiling.values())) - compile_first
    lost = sum(start.elapsed - _elapsed(rows) for start, rows in zip(starts, kept))
    down = sum(_down(before, after) for before, after in zip(starts, starts[1:]))
    observed = sum(start.elapsed for start in starts) + down
    undisturbed = observed - total["checkpoint"] - lost - restarts - down
    return WallTime(
        prepare=own[0]["prepare"],
        compile=compile_first,
        steps=total["first step"] + total["step"] - sum(compiling["step"]),
        evaluation=total["first evaluation"] + total["evaluation"] - sum(compiling["evaluation"]),
        checkpoints=total["checkpoint"],
        lost=lost,
        restarts=restarts,
        down=down,
        other=observed - lost - down - sum(total.values()),
        observed=observed,
        undisturbed=undisturbed,
        training_overhead_ratio=undisturbed / observed if observed > 0 else math.nan,
        starts=len(starts),
        steps_done_twice=sum(
            start.last_step - (rows[-1]["step"] if rows else start.step)
            for start, rows in zip(starts, kept)
        ),
    )


def _rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a kill cut it off
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _starts(rows: Iterable[dict[str, Any]]) -> Iterator[_Start]:
    """Those that did a step; looking at a finished run again is none."""
    found: list[_Start] = []
    for row in rows:
        if "start" in row:
            found.append(_Start(float(row["start"]), row["step"]))
        elif found:
            found[-1].rows.append(row)
    return (
        start
        for number, start in enumerate(found)
        if number == 0 or start.last_step > start.step or found[number - 1].end != FINISHED
    )


def _kept(start: _Start, later: list[_Start]) -> list[dict[str, Any]]:
    """The rows of what no later start did again."""
    again = min((one.step for one in later), default=start.last_step)
    return [row for row in start.rows if row["step"] <= max(again, start.step)]


def _elapsed(rows: list[dict[str, Any]]) -> float:
    return float(rows[-1]["elapsed"]) if rows else 0.0


def _sums(rows: list[dict[str, Any]], key: str) -> Sums:
    found: Sums = defaultdict(float)
    for row in rows:
        for kind, amount in row.get(key, {}).items():
            found[kind] += amount
    return found


def _compiling(kind: str, own: list[Sums], rows: list[dict[str, Any]]) -> list[float]:
    """What the first of its kind took longer in each start than the median of the others.

    Where there was no other, a step is all compilation, and an evaluation is none.
    """
    others = [
        row["seconds"][kind] / row["counts"][kind]
        for row in rows
        if row.get("counts", {}).get(kind) and kind in row["seconds"]
    ]
    typical = median(others) if others else (0.0 if kind == "step" else math.inf)
    return [max(seconds[f"first {kind}"] - typical, 0.0) for seconds in own]


def _down(before: _Start, after: _Start) -> float:
    if before.end in (STOPPED, FINISHED):
        return 0.0
    return max(after.at - before.at - before.elapsed, 0.0)
