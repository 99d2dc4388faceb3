"""The floors of the house: imports point down, and some rooms do without MindSpore
(docs/architecture.md).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pangu_locmoe"
FLOORS = (
    "__main__",
    "cli",
    "check",
    "simulate",
    "train",
    "convert",
    "report",
    "checkpoint",
    "generate",
    "model",
    "moe",
    "data",
    "parallel",
    "expert_load",
    "nn",
    "config",
    "interrupts",
    "console",
    "files",
    "errors",
)
"""top to bottom"""
WITHOUT_MINDSPORE = ("config", "expert_load", "simulate", "report", "cli")
# What needs an extra, or MindSpore, and is imported where it is asked for alone.
APART = ("launch", "arima", "lstm")


def imported(file: Path) -> Iterator[str]:
    """Modules of the package that a file names in an import, at the top or in a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), (
                f"{file}: a relative import"
            )
            continue
        yield from (name for name in names if name.startswith("pangu_locmoe."))


def files() -> Iterator[Path]:
    """Those that are run here: templates go to where Transformers imports them, relatively."""
    return (file for file in sorted(PACKAGE.rglob("*.py")) if file.parent.name != "templates")


def floor_of(name: str) -> str:
    return name.split(".")[1]


def test_every_file_is_on_a_floor():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__"} == set(FLOORS)


def test_imports_point_down():
    up = []
    for file in files():
        own = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for name in imported(file):
            floor = floor_of(name)
            if floor in FLOORS and FLOORS.index(floor) < FLOORS.index(own):
                up.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not up


def test_nothing_of_the_package_knows_the_scripts():
    scripts = {
        path.stem for path in (ROOT / "scripts").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] not in scripts, file


@pytest.mark.parametrize("floor", WITHOUT_MINDSPORE)
def test_a_floor_does_without_mindspore(floor):
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((PACKAGE / floor).rglob("*.py"))
        if file.stem not in APART
    ]
    lines = [f"import {', '.join(modules)}"]
    if floor == "config":
        lines.append("pangu_locmoe.config.load_config('configs/cpu_smoke.yaml')")
    command = [sys.executable, "-X", "importtime", "-c", "; ".join(lines)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert f"pangu_locmoe.{floor}" in done.stderr
    assert "mindspore" not in done.stderr
