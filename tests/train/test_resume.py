"""A run that was stopped, however it was stopped, goes on as if nothing had happened."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from support import tiny

from pangu_locmoe.checkpoint.format import latest_whole_checkpoint, read_arrays, remove_old
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.errors import CheckpointError, ConfigError
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.loop import Trainer
from pangu_locmoe.train.run import train
from pangu_locmoe.train.schedule import learning_rate


def test_a_signal_between_two_looks_is_not_lost(tmp_path):
    """It comes while the ranks tell each other of the last ones."""
    trainer = Trainer(tiny.reference_config(), prepare(tiny.reference_config(), False), tmp_path)

    class Late(SingleProcess):
        def all_gather(self, x):
            trainer._on_signal(signal.SIGTERM, None)
            return super().all_gather(x)

    trainer.world = World(Late(), trainer.topology)
    assert [trainer._stopping(), trainer._stopping()] == [False, True]


def short_config(**sections):
    return tiny.tiny_config(
        moe={"router": "hash"},
        train={"steps": 6, "learning_rate": 0.003},
        evaluation={"every": 3, "sequences": 2, **sections.get("evaluation", {})},
        checkpoint={"every": 2, "keep": 3, **sections.get("checkpoint", {})},
    )


@pytest.fixture
def short_run(tmp_path):
    """A copy of a finished run of 6 steps with checkpoints 2, 4 and 6."""
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-r", _short_run(), run_dir], check=True)
    return run_dir


_made: list[Path] = []


def _short_run() -> Path:
    if not _made:
        _made.append(tiny.corpus() / "short")
        train(short_config(), _made[0], progress=False)
    return _made[0]


def test_resuming_a_finished_run_repeats_nothing(short_run):
    before = tiny.rows(short_run, timing=True)
    assert train(short_config(), short_run, resume=True, progress=False) is None
    assert tiny.rows(short_run, timing=True) == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "absent", "optimizer", "state"])
def test_resuming_passes_over_a_damaged_checkpoint(short_run, damage, capsys):
    folder = short_run / "checkpoints" / "step-00000006"
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "absent":
        weights.unlink()
    elif damage == "optimizer":
        (folder / "optimizer.safetensors").write_bytes(b"x" * 100)
    else:
        (folder / "state.json").write_text('{"step": ')
    wanted = tiny.rows(short_run)
    assert latest_whole_checkpoint(short_run).name == "step-00000004"
    if damage == "truncated":
        train(short_config(), short_run, resume=True, progress=False)
        assert "resuming after step 4" in capsys.readouterr().out
        assert tiny.rows(short_run) == wanted
        assert latest_whole_checkpoint(short_run).name == "step-00000006"


def test_a_damaged_newer_checkpoint_does_not_push_out_the_whole_ones(short_run):
    """One kept checkpoint must be a whole one: the damaged step 6 does not count as the newest."""
    (short_run / "checkpoints" / "step-00000006" / "state.json").unlink()
    remove_old(short_run, 4, 1, None)
    assert latest_whole_checkpoint(short_run).name == "step-00000004"


def test_without_any_whole_checkpoint_nothing_is_written_over(short_run):
    before = tiny.rows(short_run)
    for folder in (short_run / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"step-00000006 is not a checkpoint: .*; no older checkpoint is whole: begin again in another --run-dir$",
    ):
        train(short_config(), short_run, resume=True, progress=False)
    assert tiny.rows(short_run) == before


def test_half_written_checkpoints_and_rows_are_cleared_away(short_run):
    wanted = tiny.rows(short_run)
    (short_run / "checkpoints" / ".step-00000006").mkdir()
    with (short_run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    train(short_config(), short_run, resume=True, progress=False)
    assert tiny.rows(short_run) == wanted
    assert not list((short_run / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    "key, value",
    [
        ("train.learning_rate", 0.1),
        ("moe.balance_loss", 0.5),
        ("model.dropout", 0.2),
        ("train.steps", 8),
    ],
)
def test_a_changed_key_is_refused_by_name(short_run, key, value):
    config = short_config()
    section, name = key.split(".")
    changed = config.model_copy(
        update={section: getattr(config, section).model_copy(update={name: value})}
    )
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)} = {value}: the run in .* has "):
        train(changed, short_run, resume=True, progress=False)


def test_a_run_of_an_older_version_goes_on(short_run):
    """Keys that it did not know yet have their defaults; one that is gone since is named."""
    file = short_run / "config.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    del values["placement"], values["train"]["loss_scale_window"]
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert train(short_config(), short_run, resume=True, progress=False) is None
    values["train"]["forgotten"] = 1
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(
        ConfigError,
        match=r"^the run was started with another version of pangu_locmoe: train\.forgotten = 1: ",
    ):
        train(short_config(), short_run, resume=True, progress=False)


def test_how_often_to_evaluate_and_to_save_may_change(short_run):
    changed = short_config(
        evaluation={"every": 2, "sequences": 1}, checkpoint={"every": 1, "keep": 1}
    )
    assert train(changed, short_run, resume=True, progress=False) is None


def test_a_checkpoint_of_another_model_names_the_first_weight(short_run):
    other = short_run / "checkpoints" / "step-00000006"
    arrays = read_arrays(other / "model.safetensors")
    arrays["blocks.0.norm1.gamma"] = np.ones(5, np.float32)
    save_file(arrays, other / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"another model: blocks\.0\.norm1\.gamma gives .* \[5\], not \[32\]"
    ):
        train(short_config(), short_run, resume=True, progress=False)


@pytest.mark.slow
def test_the_schedule_counts_updates_and_so_does_a_resumed_run(tmp_path):
    """fp16 with a scale that overflows at first: the rate of the first update is that of update
    1, at whichever step it comes.
    """
    config = tiny.tiny_config(
        model={"num_layers": 2, "num_moe_layers": 0},
        train={
            "precision": "fp16",
            "mode": "pynative",
            "loss_scale": 2.0**30,
            "steps": 24,
            "learning_rate": 0.003,
            "warmup_steps": 10,
        },
        evaluation={"every": 24, "sequences": 1},
        checkpoint={"every": 4, "keep": 9},
    )
    assert train(config, tmp_path / "whole", progress=False) is None
    rows = [row for row in tiny.rows(tmp_path / "whole") if "loss" in row]
    updates = 0
    for before, row in zip([{"loss_scale": 2.0**30}, *rows], rows):
        assert row["learning_rate"] == learning_rate(config.train, updates + 1)
        updates += row["loss_scale"] >= before["loss_scale"]
    assert 4 <= 24 - updates <= 16
    folder = tmp_path / "whole" / "checkpoints" / "step-00000024"
    assert json.loads((folder / "state.json").read_text())["updates"] == updates
    # From a checkpoint within the skipped steps, and from one of a version that did not count.
    for start, counts in ((4, True), (20, False)):
        run_dir = tmp_path / f"resumed{start}"
        shutil.copytree(tmp_path / "whole", run_dir)
        for other in (run_dir / "checkpoints").iterdir():
            if int(other.name[5:]) > start:
                shutil.rmtree(other)
        if not counts:
            file = run_dir / "checkpoints" / f"step-{start:08d}" / "state.json"
            state = json.loads(file.read_text())
            del state["updates"]
            file.write_text(json.dumps(state))
        assert train(config, run_dir, resume=True, progress=False) is None
        if counts:
            assert tiny.rows(run_dir) == tiny.rows(tmp_path / "whole")
        else:
            assert [row for row in tiny.rows(run_dir) if "loss" in row][start][
                "learning_rate"
            ] == learning_rate(config.train, start + 1)
