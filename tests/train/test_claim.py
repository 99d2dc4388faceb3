"""A run directory belongs to one process at a time."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from support import tiny

from pangu_locmoe.cli import main
from pangu_locmoe.errors import CheckpointError, ConfigError
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.train.claim import LOCK, claimed, default_run_dir
from pangu_locmoe.train.run import train

HOLD = (
    "import sys, time; from pathlib import Path; from pangu_locmoe.train.claim import "
    "claimed\nwith claimed(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def held(tmp_path):
    """A directory, and another process that holds it."""
    run_dir = tmp_path / "runs" / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, run_dir],
        env=tiny.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == "held\n":
            break
    yield run_dir, process
    process.kill()
    process.communicate()


def test_a_live_run_is_refused_by_name_and_a_dead_one_is_not(held, tmp_path, capsys):
    run_dir, process = held
    wanted = (
        f"--run-dir {run_dir}: process {process.pid} on {socket.gethostname()} is training "
        "there; wait for it or stop it, or give another directory"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(wanted)}$"), claimed(run_dir):
        pass
    config = tiny.write(tiny.tiny_config(moe={"router": "hash"}), tmp_path)
    for resume in ("auto", "never"):
        assert (
            main(
                [
                    "train",
                    str(config),
                    "--run-dir",
                    str(run_dir),
                    "--resume",
                    resume,
                    "--no-progress",
                ]
            )
            == 2
        )
        assert capsys.readouterr().err == f"pangu-locmoe: {wanted}\n"
    assert [path.name for path in run_dir.iterdir()] == [LOCK]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claimed(run_dir):
        assert (run_dir / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert not list(run_dir.iterdir())


def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        train(
            tiny.tiny_config(moe={"router": "hash"}),
            tmp_path / "a" / "b",
            init_from=tmp_path / "absent",
            progress=False,
        )
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError), claimed(tmp_path / "mine"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("there", ["file", "dangling"])
def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, there):
    path = tmp_path / "run"
    if there == "file":
        path.write_text("")
    else:
        path.symlink_to(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=rf"^{path} cannot be written: "), claimed(path):
        pass


def test_two_starts_at_once_take_different_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        default_run_dir("c", "m:R", False, SingleProcess()) as one,
        default_run_dir("c", "m:R", False, SingleProcess()) as two,
    ):
        assert (str(one), str(two)) == ("runs/c-R", "runs/c-R-2")
        (one / "kept").touch()
        with default_run_dir("c", "m:R", True, SingleProcess()) as newest:
            assert newest == two
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["c-R"]


def test_resume_with_nothing_to_resume_says_so(tmp_path, capsys):
    config = tiny.tiny_config(
        moe={"router": "hash"},
        train={"steps": 1, "warmup_steps": 0, "mode": "pynative"},
        evaluation={"every": 1, "sequences": 1},
    )
    train(config, tmp_path / "run", resume=True, progress=False)
    assert (
        f"nothing to resume: {tmp_path / 'run'} has no checkpoint; starting at step 0\n"
        in capsys.readouterr().out
    )
