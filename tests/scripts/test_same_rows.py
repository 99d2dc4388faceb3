"""The end of kill_test.sh: two runs have the same metrics, whatever the clock said."""

from __future__ import annotations

import json
from pathlib import Path

import overhead
import pytest
import same_rows


def run(folder: Path, losses: list[float], seconds: float) -> Path:
    folder.mkdir()
    rows = [
        {"step": step, "loss": loss, "seconds": seconds, "tokens_per_second": 8 / seconds}
        for step, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_times_may_differ(tmp_path, capsys):
    runs = run(tmp_path / "whole", [3.0, 2.0], 1.0), run(tmp_path / "killed", [3.0, 2.0], 2.0)
    assert same_rows.main([str(path) for path in runs]) == 0
    assert capsys.readouterr().out == "all 2 rows are those of the undisturbed run\n"


@pytest.mark.parametrize(
    "losses, found",
    [
        ([3.0, 2.5], "2 rows, not 2; steps that differ: [2]"),
        ([3.0], "1 rows, not 2; steps that differ: []"),
        ([3.0, 2.0, 1.0], "3 rows, not 2; steps that differ: []"),
    ],
)
def test_a_loss_or_a_row_may_not(tmp_path, capsys, losses, found):
    whole, killed = run(tmp_path / "whole", [3.0, 2.0], 1.0), run(tmp_path / "killed", losses, 1.0)
    assert same_rows.main([str(whole), str(killed)]) == 1
    assert capsys.readouterr().err == f"{killed}: {found}\n"


def test_where_the_time_went_is_one_line_for_each_run(tmp_path, capsys):
    time = {part: 1.0 for part in overhead.PARTS}
    time.update(observed=9.0, starts=2, steps_done_twice=3, training_overhead_ratio=0.5555)
    (tmp_path / "summary.json").write_text(json.dumps({"wall_time": time}))
    assert overhead.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path.name}: 9.0 s in 2 starts: prepare 1.0, compile 1.0, steps 1.0, evaluation 1.0, "
        "checkpoints 1.0, lost 1.0, restarts 1.0, down 1.0, other 1.0; 3 steps done twice; "
        "training overhead ratio 0.555\n"
    )
