"""docs/tutorial.md works as it stands: its code, its configuration and its commands, in an empty
folder.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from pangu_locmoe.cli import main
from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.moe.routers import ROUTERS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
NAME = "cosine_router:CosineRouter"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[list[str]]:
    """The verbs of the document's commands with their arguments; the shell script and the
    installed command are the same program.
    """
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines]
    return [
        ["train", *rest[2:]] if rest[:2] == ["bash", "scripts/train.sh"] else rest[1:]
        for rest in words
    ]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The working directory: the text that a clone has, and what the reader saves."""
    for name in ("docs", "pangu_locmoe"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "cosine_router.py").write_text(blocks("python")[0], encoding="utf-8")
    (tmp_path / "tutorial.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    ROUTERS.pop(NAME, None)
    ROUTER_TRAITS.pop(NAME, None)
    sys.modules.pop("cosine_router", None)


def test_the_router_is_short():
    assert len(blocks("python")) == len(blocks("yaml")) == 1
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) < 40


def test_every_command_does_what_the_text_says(clone, capsys):
    said = {}
    for command in commands():
        assert main(command) == 0, capsys.readouterr().err
        said[" ".join(command[:2] if command[0] == "load" else command[:1])] = (
            capsys.readouterr().out
        )
    assert list(said) == ["train", "report", "load states", "load forecast", "load place"]
    runs = clone / "runs" / "tutorial"
    for name in ("cosine", "locmoe"):
        rows = [
            json.loads(line)
            for line in (runs / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == 100 and losses[-1] < losses[0] - 0.5
    page = (runs / "report.html").read_text(encoding="utf-8")
    assert NAME in page and "locmoe" in page
    assert (
        re.search(r"^  MoE layer 0: ", said["load states"], re.MULTILINE)
        and (runs / "states.svg").exists()
    )
    assert re.search(r"^  mean_wape +0\.\d+", said["load forecast"], re.MULTILINE)
    assert re.search(r"^moves \d+ experts", said["load place"], re.MULTILINE)
    assert sorted(
        json.loads((runs / "plan.json").read_text(encoding="utf-8"))["slot_to_expert"][0]
    ) == [0, 1, 2, 3]
