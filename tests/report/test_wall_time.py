"""Where the time went, from rows whose sums are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import pytest

from pangu_locmoe.report.wall_time import TIME_FILE, read_wall_time

FIRST = {"first step": 1, "first evaluation": 1}


def row(at: int, elapsed: float, /, end: Optional[str] = None, **seconds: float) -> dict[str, Any]:
    seconds = {key.replace("_", " "): value for key, value in seconds.items()}
    return {
        "step": at,
        "elapsed": elapsed,
        "seconds": seconds,
        "counts": {"step": round(seconds.get("step", 0)), "evaluation": 1, **FIRST},
        **({} if end is None else {"end": end}),
    }


def write(run_dir: Path, *rows: dict[str, Any], cut_off: str = "") -> Path:
    text = "".join(json.dumps(one) + "\n" for one in rows) + cut_off
    (run_dir / TIME_FILE).write_text(text, encoding="utf-8")
    return run_dir


# Steps take a second, the first one of each start five; the first is killed six steps after its
# checkpoint and two seconds after its last row, and nobody looks for another ten.
KILLED = (
    {"start": 1000.0, "step": 0},
    row(0, 3.0, prepare=3.0),
    row(4, 13.0, first_step=5.0, step=3.0, checkpoint=2.0),
    row(10, 19.5, step=6.0),
)
RESUMED = (
    {"start": 1031.5, "step": 4},
    row(4, 2.0, prepare=2.0),
    row(12, 17.0, end="finished", first_step=5.0, step=7.0, checkpoint=2.0),
)


def test_what_a_restart_does_again_is_lost(tmp_path):
    time = read_wall_time(write(tmp_path, *KILLED, *RESUMED, cut_off='{"step": 1'))
    assert time is not None
    expected = {
        "prepare": 3.0,
        "compile": 4.0,
        "steps": 12.0,
        "evaluation": 0.0,
        "checkpoints": 4.0,
        "lost": 6.5,
        "restarts": 2.0 + 4.0,
        "down": 12.0,
        "other": 1.0,
    }
    assert {key: getattr(time, key) for key in expected} == pytest.approx(expected)
    assert time.observed == pytest.approx(sum(expected.values())) == 19.5 + 12.0 + 17.0
    assert (time.starts, time.steps_done_twice) == (2, 6)
    assert time.undisturbed == pytest.approx(3 + 4 + 12 + 1)
    assert time.training_overhead_ratio == pytest.approx(20 / 48.5)


def test_a_pause_after_a_saved_stop_is_no_time_of_the_run(tmp_path):
    stopped = (*KILLED[:2], row(4, 13.0, end="stopped", first_step=5.0, step=3.0, checkpoint=2.0))
    time = read_wall_time(write(tmp_path, *stopped, *RESUMED))
    assert time is not None
    assert (time.down, time.lost, time.steps_done_twice) == (0, 0, 0)
    assert time.observed == 13.0 + 17.0


def test_looking_again_at_a_finished_run_takes_none_of_its_time(tmp_path):
    before = read_wall_time(write(tmp_path, *KILLED, *RESUMED))
    again = ({"start": 9000.0, "step": 12}, row(12, 4.0, end="finished", prepare=2.0))
    assert read_wall_time(write(tmp_path, *KILLED, *RESUMED, *again)) == before


def test_a_run_killed_before_its_first_checkpoint_has_lost_everything(tmp_path):
    begun = (KILLED[0], KILLED[1], row(2, 9.0, first_step=5.0, step=1.0))
    again = ({"start": 1009.0, "step": 0}, *KILLED[1:3], row(5, 14.0, end="finished", step=1.0))
    time = read_wall_time(write(tmp_path, *begun, *again))
    assert time is not None
    assert (time.lost, time.steps_done_twice, time.down) == (6.0, 2, 0.0)
    assert (time.prepare, time.restarts, time.steps) == (3.0, 3.0 + 4.0, 5.0)


def test_going_back_behind_a_damaged_checkpoint_loses_what_two_starts_did(tmp_path):
    third = ({"start": 1060.0, "step": 0}, row(1, 6.0, prepare=1.0, first_step=5.0))
    time = read_wall_time(write(tmp_path, *KILLED, *RESUMED, *third))
    assert time is not None
    assert time.steps_done_twice == 10 + 8
    assert time.lost == pytest.approx(19.5 - 3 + 17 - 2)


def test_a_run_of_an_older_version_has_none(tmp_path):
    assert read_wall_time(tmp_path) is None
    assert read_wall_time(write(tmp_path, cut_off="{")) is None
