"""One configuration, unchanged, on one process, on several and on the emulated cluster: the same
losses.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import jobs, tiny

from pangu_locmoe.cli import main

pytestmark = [pytest.mark.alone, pytest.mark.slow]


def losses(run_dir: Path) -> list[float]:
    rows = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [row["loss"] for row in rows if "loss" in row] + [
        row["validation_loss"] for row in rows if "validation_loss" in row
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("one-file")
    config = tiny.tiny_config(
        moe={"locality_loss": 0.1},
        data={"sharding": "domain"},
        parallel={"nodes": 2},
        train={"steps": 6, "epsilon": 1e-6, "learning_rate": 5e-4},
    )
    file = tiny.write(config, folder)
    assert main(["train", str(file), "--run-dir", str(folder / "one"), "--no-progress"]) == 0
    return file, losses(folder / "one")


def script(file: Path, run_dir: Path, name: str, *flags: str) -> list[float]:
    command = [
        "bash",
        f"scripts/{name}.sh",
        str(file),
        "--run-dir",
        str(run_dir),
        "--no-progress",
        *flags,
    ]
    done = subprocess.run(command, cwd=jobs.ROOT, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr + jobs.logs(run_dir)
    return losses(run_dir)


def test_four_processes(one, tmp_path):
    file, wanted = one
    assert script(
        file, tmp_path / "run", "train_cpu_cluster", "--port", str(jobs.free_port())
    ) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"),
    reason="network namespaces need root and iproute2",
)
def test_the_emulated_cluster(one, tmp_path):
    file, wanted = one
    assert script(file, tmp_path / "run", "emulate_cluster", "--rate", "1gbit") == pytest.approx(
        wanted, abs=1e-4
    )
