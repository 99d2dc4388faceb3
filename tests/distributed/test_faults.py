"""What a user sees when something goes wrong in a job: one line that names the rank, an exit
code, and no hang.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

import pytest
from support import jobs, tiny

pytestmark = pytest.mark.alone

RANKS = 4
LAUNCH = jobs.ROOT / "pangu_locmoe" / "cli" / "launch.py"


def config_file(folder: Path, **train) -> Path:
    return tiny.write(
        tiny.tiny_config(
            moe={"locality_loss": 0.1},
            train={"steps": 24, "mode": "pynative", **train},
            checkpoint={"every": 4},
            evaluation={"every": 12, "sequences": 2},
        ),
        folder,
    )


def script(*arguments: object) -> list[str]:
    return ["bash", "scripts/train_cpu_cluster.sh", *map(str, arguments)]


def cluster(config: Path, run_dir: Path) -> subprocess.Popen[str]:
    command = script(
        "--ranks",
        RANKS,
        "--ranks-per-node",
        2,
        config,
        "--run-dir",
        run_dir,
        "--port",
        jobs.free_port(),
        "--resume",
        "auto",
        "--no-progress",
    )
    return subprocess.Popen(
        command, cwd=jobs.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(what, process: subprocess.Popen[str], timeout: float = 300) -> None:
    end = time.monotonic() + timeout
    while not what():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def steps_done(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(re.findall(r'"loss"', file.read_text(encoding="utf-8"))) if file.exists() else 0


def process_of(run_dir: Path, rank: int) -> int:
    found = re.search(
        r"^\[INFO\] rank \d is process (\d+)$",
        (run_dir / "logs" / f"worker_{rank}.log").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert found
    return int(found[1])


def kill(run_dir: Path, process: subprocess.Popen[str], rank: int) -> tuple[float, str]:
    """kill -9; how long the job took to end, and what it said."""
    os.kill(process_of(run_dir, rank), signal.SIGKILL)
    killed = time.monotonic()
    _, error = process.communicate(timeout=120)
    return time.monotonic() - killed, error


def test_a_killed_rank_ends_the_job_with_its_name(tmp_path):
    run_dir = tmp_path / "run"
    process = cluster(config_file(tmp_path, steps=2000), run_dir)
    wait_for(lambda: steps_done(run_dir) >= 3, process)
    others = [process_of(run_dir, rank) for rank in (0, 1, 3)]
    seconds, error = kill(run_dir, process, 2)
    assert process.returncode == 1
    assert (
        error.splitlines()[0]
        == "train_cpu_cluster.sh: rank 2 was ended by SIGKILL; was it short of memory?"
    )
    assert len(error.splitlines()) == 2 and "Traceback" not in error
    assert seconds < 15
    assert not [pid for pid in others if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_a_killed_job_resumes_as_if_nothing_had_happened(tmp_path):
    config = config_file(tmp_path)
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    undisturbed = cluster(config, whole)
    _, error = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, error
    process = cluster(config, cut)
    wait_for(lambda: steps_done(cut) >= 10, process)
    kill(cut, process, 1)
    assert process.returncode == 1
    process = cluster(config, cut)
    said, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert re.search(r"resuming after step (8|12|16|20)", said)
    assert exact(cut) == exact(whole)


def exact(run_dir: Path) -> list[dict]:
    """Rows without seconds."""
    return [
        {key: value for key, value in row.items() if "seconds" not in key}
        for row in tiny.rows(run_dir)
    ]


@pytest.mark.slow
def test_a_terminated_job_has_saved_its_last_step(tmp_path):
    run_dir = tmp_path / "run"
    process = cluster(config_file(tmp_path, steps=2000), run_dir)
    wait_for(lambda: steps_done(run_dir) >= 5, process)
    ranks = [process_of(run_dir, rank) for rank in range(RANKS)]
    process.terminate()
    said, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (143, "train_cpu_cluster.sh: stopping after this step\n")
    stopped = re.search(r"stopped by SIGTERM after step (\d+), state saved", said)
    assert (
        stopped
        and (
            run_dir / "checkpoints" / f"step-{int(stopped[1]):08d}" / "model-rank3.safetensors"
        ).is_file()
    )
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_a_late_rank_does_not_end_the_job(tmp_path):
    """Nor does one that is stopped altogether."""
    run_dir = tmp_path / "run"
    process = cluster(config_file(tmp_path, steps=60), run_dir)
    wait_for(lambda: steps_done(run_dir) >= 3, process)
    os.kill(process_of(run_dir, 3), signal.SIGSTOP)
    before = steps_done(run_dir)
    time.sleep(20)
    assert before <= steps_done(run_dir) <= before + 2, "the others should wait"
    os.kill(process_of(run_dir, 3), signal.SIGCONT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert steps_done(run_dir) == 60


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_is_one_line(tmp_path, taken_port):
    done = subprocess.run(
        script(
            "--ranks", 2, config_file(tmp_path), "--run-dir", tmp_path / "run", "--port", taken_port
        ),
        cwd=jobs.ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (
        2,
        f"train_cpu_cluster.sh: --port {taken_port}: in use; give another one\n",
    )
    assert not (tmp_path / "run").exists()


def wrapped_python(folder: Path, body: str) -> dict[str, str]:
    """An environment whose python is a shell script with this body before the true one starts."""
    folder.mkdir()
    program = folder / "python"
    program.write_text(f'#!/bin/bash\n{body}\nexec {sys.executable} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    environment = jobs.environment()
    return {**environment, "PATH": f"{folder}:{environment['PATH']}"}


@pytest.mark.slow
def test_a_rank_that_never_starts_is_one_line(tmp_path):
    env = wrapped_python(tmp_path / "bin", '[ "$MS_ROLE$RANK_ID" != MS_WORKER1 ] || exec sleep 900')
    done = jobs.msrun(
        2,
        tmp_path,
        "--cluster_time_out",
        30,
        LAUNCH,
        "train",
        config_file(tmp_path),
        timeout=400,
        env=env,
    )
    assert done.returncode == 1
    assert re.search(
        r"^pangu-locmoe: rank 0 cannot join the job of 2 processes at 127\.0\.0\.1:\d+: another rank did not start within 30 s",
        jobs.logs(tmp_path),
        re.MULTILINE,
    )
    (tmp_path / "logs" / "msrun.log").write_text(done.stdout, encoding="utf-8")
    assert explained(tmp_path / "logs").startswith("rank 1 did not start: ")


def test_another_configuration_on_another_node_names_the_rank(tmp_path):
    env = wrapped_python(
        tmp_path / "bin", '[ "$MS_ROLE$RANK_ID" != MS_WORKER1 ] || set -- "$@" --set train.seed=2'
    )
    parallel = [
        "--set",
        "parallel.expert_parallel=2",
        "--set",
        "parallel.nodes=2",
        "--run-dir",
        tmp_path / "run",
    ]
    done = jobs.msrun(
        2, tmp_path, LAUNCH, "train", config_file(tmp_path), *parallel, timeout=400, env=env
    )
    assert done.returncode == 1
    wanted = (
        "rank 1 has another configuration than rank 0: start every node with the same file and "
        "--set"
    )
    assert f"pangu-locmoe: {wanted}" in jobs.logs(tmp_path).splitlines()
    assert not (tmp_path / "run").exists()


def explained(logs: Path) -> str:
    done = subprocess.run(
        [sys.executable, "scripts/explain_job.py", str(logs)],
        cwd=jobs.ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout.count("\n") <= 1
    return done.stdout.strip()


@pytest.mark.parametrize(
    "msrun, workers, line",
    [
        (
            "Worker process 12 exit with exception. Error code: -9.",
            {},
            "rank 1 was ended by SIGKILL; was it short of memory?",
        ),
        (
            "Worker process 12 exit with exception. Error code: -11.",
            {},
            "rank 1 was ended by SIGSEGV",
        ),
        ("Worker process 11 exit with exception. Error code: 2.", {1: "pangu-locmoe: bad"}, "bad"),
        (
            "Worker process 11 exit with exception. Error code: 1.",
            {0: "Traceback\n[WARNING] x\nValueError: no"},
            "rank 0 failed with exit code 1: ValueError: no",
        ),
        (
            "Worker process 99 exit with exception. Error code: -9.",
            {},
            "a rank was ended by SIGKILL; was it short of memory?",
        ),
        ("", {}, ""),
    ],
)
def test_the_explanation_of_a_failed_job(tmp_path, msrun, workers, line):
    (tmp_path / "msrun.log").write_text(f"[ERROR] {msrun}\n", encoding="utf-8")
    for rank in (0, 1):
        (tmp_path / f"worker_{rank}.log").write_text(
            f"[INFO] rank {rank} is process {11 + rank}\n{workers.get(rank, '')}\n",
            encoding="utf-8",
        )
    assert explained(tmp_path) == line
