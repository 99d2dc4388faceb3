"""Every command in README, docs and the configurations' comments is one that exists; those that
take moments are run.
"""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Optional

import pytest

from pangu_locmoe.cli.verbs import _parser, main
from pangu_locmoe.config import load_config
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.job import plan_job

ROOT = Path(__file__).resolve().parents[2]
# docs/tutorial.md is worked through, command by command, by test_tutorial.py.
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "tutorial.md"),
]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
COMMAND = re.compile(r"(?:\.venv/bin/)?pangu-locmoe (?=[a-z])|bash scripts/|sbatch .*?scripts/")
PLACEHOLDERS = {
    "CONFIG": "configs/cpu_smoke.yaml",
    "SPARSE": "configs/cpu_smoke.yaml",
    "STEPS": "100",
    "N": "4",
    "R": "2",
    "K": "2",
}
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT / "scripts").with_suffix("").parts)
    for path in (ROOT / "scripts").rglob("*.py")
    if path.name != "__init__.py"
)


def found(file: Path) -> list[tuple[str, Optional[str]]]:
    """Commands of a document, and the error that it shows below one, if it does."""
    lines = file.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    commands: list[tuple[str, Optional[str]]] = []
    for line, below in zip(lines, [*lines[1:], ""]):
        texts = re.findall(r"`([^`]+)`", line) or [line]
        if file == ROOT / "README.md" and line.startswith("| `"):  # its table of verbs
            texts = [f"pangu-locmoe {texts[0]}"]
        for text in texts:
            match = COMMAND.match(re.sub(r"^[\s#$]*|^.*?: (?=pangu-locmoe )", "", text))
            if match:
                command = re.sub(r"^[\s#$]*|^.*?: (?=pangu-locmoe )", "", text)
                commands.append(
                    (
                        command.split("  #")[0].split(" #")[0].strip(),
                        below if below.startswith("pangu-locmoe: ") else None,
                    )
                )
    return commands


COMMANDS = sorted({command for file in [*DOCUMENTS, *CONFIGS] for command in found(file)}, key=str)
VERBS = [
    (command, error) for command, error in COMMANDS if re.search(r"pangu-locmoe \w+ .", command)
]  # more than a verb's name
SHELL = [
    command for command, _ in COMMANDS if "scripts/" in command and "pangu-locmoe" not in command
]


def words(command: str) -> list[str]:
    return [PLACEHOLDERS.get(word, word) for word in shlex.split(command.replace(".venv/bin/", ""))]


def test_commands_are_found():
    text = [command for command, _ in COMMANDS]
    assert len(VERBS) > 20 and len(SHELL) > 15
    assert "bash scripts/measure_placement.sh" in text and any(
        command.startswith("pangu-locmoe load place") for command in text
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_imported(name):
    if name == "examples.evaluate_in_transformers":
        pytest.importorskip("transformers", reason="needs pip install '.[export]'")
    assert importlib.import_module(name).__doc__


def test_the_experiments_of_reproduce_are_the_studys():
    from study.reproduce import ALL

    text = (ROOT / "scripts" / "reproduce.sh").read_text(encoding="utf-8")
    names = re.search(r"experiments='(.*)'", text)
    assert names is not None and names.group(1).split("|") == [one.name for one in ALL]


@pytest.mark.parametrize("command, error", VERBS)
def test_a_verb_has_these_flags_and_this_configuration(command, error, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if error is not None:
        assert main(words(command)[1:]) == 2
        assert capsys.readouterr().err == f"{error}\n"
        return
    options = _parser().parse_args(words(command)[1:])
    if hasattr(options, "config"):
        config = load_config(options.config, options.set)
        if hasattr(options, "ranks") and "CONFIG" not in command:
            Topology.from_config(config, options.ranks)
    if words(command)[1] in ("capacity", "simulate"):
        assert main(words(command)[1:]) == 0


@functools.cache
def explained(script: str) -> str:
    return subprocess.run(
        ["bash", f"scripts/{script}", "--help"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout


@pytest.mark.parametrize("command", SHELL)
def test_a_script_has_these_flags_and_this_configuration(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, _, after = command.partition("scripts/")
    script, *rest = words(after)
    text = explained(script) + (explained("train_ascend.sh") if script == "slurm_ascend.sh" else "")
    flags: dict[str, list[str]] = {}
    positional: list[str] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            positional.append(word)
            continue
        assert re.search(rf"(^|[ \[]){word}\b", text, re.MULTILINE), f"{script} has no {word}"
        takes_value = re.search(rf"{word} ([A-Z]+\b|\w+\|)", text)
        flags.setdefault(word, []).append(rest.pop(0) if takes_value else "")
    default = re.search(
        r"CONFIG \((configs/[\w/]+\.yaml)\)|--config CONFIG +(?:\w[\w ]*\()?(configs/[\w/]+\.yaml)",
        text,
    )
    if not positional and default is None:
        return
    assert len(positional) <= 1
    path = Path(positional[0] if positional else next(filter(None, default.groups())))
    if script in ("train_cpu_cluster.sh", "emulate_cluster.sh"):
        shape = {
            flag[2:].replace("-", "_"): int(value[0])
            for flag, value in flags.items()
            if flag in ("--ranks", "--nodes", "--ranks-per-node")
        }
        plan_job(path, flags.get("--set", []), **shape)
    else:
        load_config(path, flags.get("--set", []))
