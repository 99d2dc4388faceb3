"""Reading a run directory: what counts as one, and what damage it survives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pangu_locmoe.errors import DataError, LocMoEError
from pangu_locmoe.report.run import number, read_run
from pangu_locmoe.report.series import bin_rows, duration, moving_mean, percent, text, thin


def write(path: Path, lines: list[Any], config: str = "model:\n  num_layers: 5\n") -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(config)
    (path / "metrics.jsonl").write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def test_rows_are_sorted_by_kind(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 1, "validation_loss": 2.5},
        {"event": "capacity", "step": 1, "layers": []},
        {"event": "stop"},
    ]
    run = read_run(write(tmp_path / "run", lines))
    assert (len(run.training), len(run.validation), len(run.events)) == (1, 1, 2)
    assert run.final == {"step": 1, "validation_loss": 2.5}
    assert any("unfinished" in note for note in run.notes)


def test_a_cut_off_last_line_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "run", [{"step": 1, "loss": 3.0}])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    run = read_run(path)
    assert run.column("step").tolist() == [1]
    assert not any("unreadable" in note for note in run.notes)


def test_a_broken_line_in_the_middle_is_left_out_and_noted(tmp_path: Path) -> None:
    run = read_run(
        write(tmp_path / "run", [{"step": 1, "loss": 3.0}, "{]", "7", {"step": 3, "loss": 2.0}])
    )
    assert run.column("step").tolist() == [1, 3]
    assert any("2 unreadable line(s) left out, the first is line 2" in note for note in run.notes)


def test_the_later_of_two_rows_for_a_step_wins(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": float(s)} for s in (1, 2, 3)] + [
        {"step": s, "loss": 10.0 * s} for s in (2, 3, 4)
    ]
    run = read_run(write(tmp_path / "run", lines))
    assert run.column("step").tolist() == [1, 2, 3, 4]
    assert run.column("loss").tolist() == [1, 20, 30, 40]


def test_null_nan_and_missing_values_become_nan(tmp_path: Path) -> None:
    run = read_run(
        write(
            tmp_path / "run",
            [
                {"step": 1, "loss": None},
                {"step": 2, "loss": math.nan},
                {"step": 3, "loss": "Infinity"},
            ],
        )
    )
    assert np.isnan(run.column("loss")[:2]).all() and math.isinf(run.column("loss")[2])
    assert np.isnan(run.column("capacity")).all()
    assert math.isnan(number(True)) and math.isnan(number([1])) and number("2.5") == 2.5


def test_seconds_count_the_steps_between_rows(tmp_path: Path) -> None:
    run = read_run(
        write(
            tmp_path / "run", [{"step": s, "loss": 1.0, "step_seconds": 0.5} for s in (10, 20, 30)]
        )
    )
    assert run.seconds.tolist() == [5, 10, 15]


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_a_directory_that_is_not_a_run(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path / "run", [])
    (path / missing).unlink()
    with pytest.raises(DataError, match=f"not a run directory: it has no {missing}") as caught:
        read_run(path)
    assert isinstance(caught.value, LocMoEError) and "\n" not in str(caught.value)


def test_no_directory_a_file_and_a_bad_configuration(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_run(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="it is a file"):
        read_run(tmp_path / "file")
    for index, config in enumerate(("a: [", "- 1")):
        with pytest.raises(DataError, match=r"config\.yaml: ") as caught:
            read_run(write(tmp_path / str(index), [], config))
        assert "\n" not in str(caught.value)


def test_a_damaged_load_trace_or_summary_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "run", [{"step": 1, "loss": 3.0}])
    (path / "load.npz").write_bytes(b"PK\x03\x04 half a file")
    (path / "summary.json").write_text('{"param')
    run = read_run(path)
    assert run.load is None and run.summary == {}
    assert any(
        note.startswith("Expert load is not shown: load.npz: not a load trace: ")
        for note in run.notes
    )
    assert any(note.startswith("summary.json") for note in run.notes)
    np.savez(path / "load.npz", load=np.ones((2, 3)), step=np.arange(2))
    assert "needs step [rows] and load [rows, layers, experts]" in read_run(path).notes[0]
    np.savez(
        path / "load.npz", load=np.ones((2, 1, 4)), step=np.arange(2), source=np.ones((2, 1, 3, 5))
    )
    run = read_run(path)
    assert run.load is None and "source has shape" in run.notes[0]


def test_thinning_keeps_spikes_and_sums() -> None:
    y = np.zeros(10_000)
    y[777], y[5000] = 9, np.nan
    x, thinned = thin(np.arange(10_000.0), y, 400)
    assert len(x) <= 400 and np.nanmax(thinned) == 9
    counts = np.arange(24).reshape(12, 2)
    assert (
        bin_rows(counts, 5).shape == (5, 2)
        and (bin_rows(counts, 5).sum(axis=0) == counts.sum(axis=0)).all()
    )


def test_the_moving_mean_leaves_gaps_out() -> None:
    assert moving_mean(np.array([1.0, 2.0, 3.0, np.nan, 5.0]), 3)[[0, 1, 2, 4]].tolist() == [
        1.5,
        2,
        2.5,
        5,
    ]
    assert np.isnan(moving_mean(np.array([np.nan, np.inf]), 3)).all()


def test_numbers_read_well() -> None:
    assert [text(value) for value in (1234567.0, 2.61987, 0.0, math.nan, math.inf, 123.456)] == [
        "1,234,567",
        "2.620",
        "0",
        "–",
        "∞",
        "123.5",
    ]
    assert (percent(0.125), percent(1.0), duration(59), duration(3725)) == (
        "12.5 %",
        "100 %",
        "59 s",
        "1 h 02 min",
    )
