"""The API reference renders, and shows what the docstrings say."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_pages_show_classes_arguments_and_errors(tmp_path):
    pytest.importorskip("pdoc", reason="the extra docs is not installed")
    modules = ["pangu_locmoe.config", "pangu_locmoe.moe.routers.base"]
    command = [sys.executable, "scripts/api_docs.py", "--output", str(tmp_path), *modules]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'index.html'}\n"), done.stderr
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert "index.html" in names and not any("__main__" in name for name in names)
    page = (tmp_path / "pangu_locmoe" / "config.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "load_config" in text and "ConfigError: naming key, value and what is allowed." in text
    page = (tmp_path / "pangu_locmoe" / "moe" / "routers" / "base.html").read_text(encoding="utf-8")
    assert "Route T tokens." in page
