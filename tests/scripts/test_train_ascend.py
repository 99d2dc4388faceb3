"""scripts/train_ascend.sh and the pre-flight: what they refuse, and what a dry run says would
run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = "configs/ascend/small.yaml"
PAPER = "configs/ascend/paper_38b.yaml"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "scripts/train_ascend.sh", "--python", sys.executable, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def exported(text: str) -> dict[str, str]:
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("export ")]
    return dict(words[1].split("=", 1) for words in lines)


def command(text: str) -> list[str]:
    return shlex.split(text.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nodes", "0"], "--nodes must be a whole number from 1 to 4096, not 0"),
        (["--nodes", "two"], "--nodes must be a whole number from 1 to 4096, not two"),
        (["--ranks-per-node", "0"], "--ranks-per-node must be a whole number from 1 to 64, not 0"),
        (["--nodes", "2"], "--nodes 2: say which of them this is with --node-rank"),
        (
            ["--nodes", "2", "--node-rank", "0"],
            "--nodes 2: say where server 0 is with --master-addr",
        ),
        (
            ["--nodes", "2", "--node-rank", "2", "--master-addr", "a"],
            "--node-rank must be a whole number from 0 to 1, not 2",
        ),
        (
            ["--nodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1"],
            "--master-addr 127.0.0.1: the other servers cannot reach it",
        ),
        (["--node-rank", "1"], "--node-rank must be a whole number from 0 to 0, not 1"),
        (
            ["--connect-timeout", "60"],
            "--connect-timeout must be a whole number from 120 to 7200, not 60",
        ),
        (
            ["--master-port", "80"],
            "--master-port must be a whole number from 1024 to 65535, not 80",
        ),
        (["--resume", "yes"], "--resume must be auto or never, not yes"),
        (["--run-dir"], "--run-dir needs a value"),
        (["configs/absent.yaml"], "configs/absent.yaml: no such configuration"),
        (["--hostfile", "absent"], "no such file"),
        (["--hostfile", "/dev/null"], "no such file"),
        (
            ["--hostfile", "absent", "--nodes", "2"],
            "--hostfile says what --nodes, --node-rank and --master-addr would",
        ),
    ],
)
def test_refusals(arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        message in done.stderr
        and done.stderr.startswith("train_ascend.sh: ")
        and done.stderr.count("\n") == 1
    )


def test_an_empty_hostfile(tmp_path):
    (tmp_path / "hosts").write_text("# none yet\n\n")
    done = run("--hostfile", str(tmp_path / "hosts"))
    assert done.returncode == 2 and "names no host" in done.stderr


def test_what_is_wrong_with_the_configuration_is_said_before_anything_starts():
    done = run("--set", "moe.routr=hash", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("train_ascend.sh: moe.routr = 'hash': unknown key")
        and done.stderr.count("\n") == 1
    )
    done = run("--ranks-per-node", "3", "--dry-run")
    assert (
        done.returncode == 2
        and "ranks (3) must be divisible by parallel.expert_parallel (8)" in done.stderr
    )


def test_one_server_is_the_default():
    done = run("--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    settings = exported(done.stdout)
    words = command(done.stdout)
    assert settings["PANGU_LOCMOE_DEVICE"] == "Ascend"
    assert (
        settings["HCCL_CONNECT_TIMEOUT"],
        settings["HCCL_EXEC_TIMEOUT"],
        settings["HCCL_BUFFSIZE"],
    ) == ("600", "1836", "200")
    assert {"HCCL_DETERMINISTIC", "HCCL_ALGO", "MS_NODE_TIMEOUT"}.isdisjoint(settings)
    assert Path(words[0]).name == "msrun"
    for pair in (
        "--worker_num 8",
        "--local_worker_num 8",
        "--master_addr 127.0.0.1",
        "--node_rank 0",
    ):
        assert f" {pair} " in " ".join(words)
    assert {"--join=True", "--bind_core=True"} <= set(words)
    program = words.index(str(ROOT / "pangu_locmoe" / "cli" / "launch.py"))
    assert words[program + 1 :] == [
        "train",
        SMALL,
        "--set",
        "parallel.nodes=1",
        "--run-dir",
        "runs/small-8-ranks",
        "--resume",
        "never",
        ">",
        "runs/small-8-ranks/logs/node-0/msrun.log",
        "2>&1",
    ]
    assert "preflight_ascend.py" in done.stdout and "--master-port 8118 || exit 3" in done.stdout
    assert not (ROOT / "runs" / "small-8-ranks").exists()


def test_one_of_several_servers():
    done = run(
        "--nodes",
        "32",
        "--node-rank",
        "31",
        "--master-addr",
        "10.0.0.1",
        "--ranks-per-node",
        "8",
        PAPER,
        "--set",
        "train.seed=7",
        "--run-dir",
        "/shared/a run",
        "--resume",
        "auto",
        "--init-from",
        "there",
        "--no-progress",
        "--deterministic",
        "--no-bind",
        "--hccl-algo",
        "level0:NA;level1:pairwise",
        "--buffer-mb",
        "300",
        "--expect",
        "abc",
        "--dry-run",
    )
    assert (done.returncode, done.stderr) == (0, "")
    settings = exported(done.stdout)
    words = command(done.stdout)
    # More than 128 devices take longer to come up.
    assert (settings["HCCL_CONNECT_TIMEOUT"], settings["MS_NODE_TIMEOUT"]) == ("1800", "1800")
    assert (settings["HCCL_DETERMINISTIC"], settings["HCCL_ALGO"], settings["HCCL_BUFFSIZE"]) == (
        "true",
        "level0:NA;level1:pairwise",
        "300",
    )
    assert "--bind_core=True" not in words
    line = " ".join(words)
    assert (
        "--worker_num 256 --local_worker_num 8 --master_addr 10.0.0.1 --master_port 8118 "
        "--node_rank 31"
    ) in line
    assert (
        "--set train.seed=7 --set parallel.nodes=32 --run-dir /shared/a run --resume auto "
        "--init-from there --no-progress"
    ) in line
    assert "--expect abc" in done.stdout
    assert (
        "--master-port" not in done.stdout.splitlines()[2]
    )  # the scheduler's port is server 0's matter


def test_a_hostfile_starts_every_server_with_the_same_hash(tmp_path):
    (tmp_path / "hosts").write_text("alpha  # the first\n# not this one\nbeta\n")
    done = run("--hostfile", str(tmp_path / "hosts"), "--set", "train.seed=7", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[:5] for line in lines] == [
        ["ssh", "-tt", "-o", "BatchMode=yes", host] for host in ("alpha", "beta")
    ]
    for rank, line in enumerate(lines):
        words = shlex.split(line[5])
        assert words[:5] == ["cd", str(ROOT), "&&", "exec", "bash"]
        flags = " ".join(words)
        assert (
            f"{SMALL} --node-rank {rank} --nodes 2 --master-addr alpha" in flags
            and "--set train.seed=7" in flags
        )
    assert len({line[5].split("--expect ")[1].split()[0] for line in lines}) == 1


@pytest.mark.parametrize(
    "codes, wanted",
    [
        ("0 3", 3),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in [("0 0", 0), ("1 0", 1), ("0 255", 1)]
        ),
    ],
)
def test_a_hostfile_job_ends_as_its_servers_do(tmp_path, codes, wanted):
    """With a stand-in for ssh that ends with the code its host is named after."""
    (tmp_path / "hosts").write_text("".join(f"host{code}\n" for code in codes.split()))
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nshift 3\necho "on $1: $2"\nexit "${1#host}"\n')
    ssh.chmod(0o755)
    done = run(
        "--hostfile",
        str(tmp_path / "hosts"),
        "--run-dir",
        str(tmp_path / "run"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert done.returncode == wanted
    if not codes.startswith(
        "1"
    ):  # where server 0 fails, the others are ended, perhaps before they say a word
        assert (tmp_path / "run" / "logs" / "node-1.log").read_text().startswith("on host")
    assert "on host" in done.stdout  # server 0's own output
    if wanted:
        assert "ended with exit code" in done.stderr


def test_a_server_that_is_not_ready_starts_nothing(tmp_path):
    """This machine has no device."""
    done = run("--run-dir", str(tmp_path / "run"), "--expect", "0" * 16)
    assert done.returncode == 3
    assert (
        "not ready: configuration and code" in done.stdout
        and "ready: MindSpore 2.10." in done.stdout
    )
    assert "is not ready, see above" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def preflight(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "scripts/preflight_ascend.py", *arguments]
    return subprocess.run(
        script,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_the_hash_follows_bases_and_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {steps: 5}\n")
    (tmp_path / "job.yaml").write_text("base: base.yaml\n")
    job = str(tmp_path / "job.yaml")

    def hashed(*arguments):
        done = preflight(job, "--fingerprint", *arguments)
        assert done.returncode == 0
        return done.stdout

    first = hashed()
    assert hashed() == first
    assert hashed("--set", "train.seed=2") != first
    (tmp_path / "base.yaml").write_text("train: {steps: 6}\n")
    assert hashed() != first


def ready_server(tmp_path: Path, version: str) -> dict[str, str]:
    """The environment of a server with stand-ins for the driver and CANN."""
    smi = tmp_path / "npu-smi"
    smi.write_text("#!/bin/sh\nexit 0\n")
    smi.chmod(0o755)
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler" / "version.info").write_text(f"# CANN\nVersion={version}\n")
    for package in ("hccl", "te"):
        (tmp_path / f"{package}.py").write_text("")
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "ASCEND_TOOLKIT_HOME": str(tmp_path),
        "ASCEND_RT_VISIBLE_DEVICES": "0,1",
    }


def test_preflight_with_stand_ins_for_driver_and_cann(tmp_path):
    server = ready_server(tmp_path, "8.5.0")
    flags = (SMALL, "--ranks", "2", "--disk-gb", "0", "--run-dir", str(tmp_path))
    done = preflight(*flags, **server)
    assert done.returncode == 0, done.stdout
    assert "ready: 2 devices for 2 ranks" in done.stdout and "Version=8.5.0" in done.stdout
    assert "ready: Python package hccl\nready: Python package te\n" in done.stdout
    (tmp_path / "compiler" / "version.info").unlink()
    (tmp_path / "version.cfg").write_text("# version: 1.0\nversion=8.5.0\n")
    assert "ready: CANN in" in preflight(*flags, **server).stdout


def test_preflight_holds_cann_against_mindspores_own_list(tmp_path):
    server = ready_server(tmp_path, "7.0.RC1")
    (tmp_path / "te.py").unlink()
    done = preflight(SMALL, "--ranks", "2", "--disk-gb", "0", **server)
    assert done.returncode == 3
    assert re.search(
        r"not ready: CANN in .*: Version=7\.0\.RC1; this MindSpore is for [\d., ]+\n", done.stdout
    )
    assert "not ready: Python package te: not found by" in done.stdout


def test_preflight_says_where_cann_is_loaded_from():
    done = preflight(SMALL)
    assert done.returncode == 3
    assert re.search(r"CANN's environment is not loaded: source \S+/set_env\.sh", done.stdout)


def test_preflight_says_which_port_is_taken(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        done = preflight(SMALL, "--master-port", str(taken.getsockname()[1]))
    assert done.returncode == 3 and "in use: give another --master-port" in done.stdout


def slurm(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A copy of slurm_ascend.sh, as sbatch runs one, in a job of two servers."""
    copy = tmp_path / "slurm_script"
    copy.write_bytes((ROOT / "scripts" / "slurm_ascend.sh").read_bytes())
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho alpha\necho beta\n")
    scontrol.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(copy), *arguments],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=60,
        env={**os.environ, **job, "PATH": path},
    )


def test_slurm_starts_train_ascend_on_every_server(tmp_path):
    flags = ["--ranks-per-node", "8", SMALL, "--set", "train.seed=7", "--no-bind"]
    done = slurm(tmp_path, *flags[:3], "--dry-run", *flags[3:])
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[0] == "srun" and words[-len(flags) - 2 :] == ["--master-addr", "alpha", *flags]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nonsense"], "unknown flag --nonsense; --help lists the flags"),
        (["--nodes", "2"], "--nodes comes from Slurm: leave it out"),
        (["--hostfile", "hosts"], "--hostfile comes from Slurm: leave it out"),
    ],
)
def test_slurm_refuses(tmp_path, arguments, message):
    done = slurm(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"slurm_ascend.sh: {message}\n"
