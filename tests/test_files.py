"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import numpy as np
import pytest

from pangu_locmoe.files import json_text, write_atomic


def test_it_writes_and_replaces(tmp_path):
    file = tmp_path / "a.json"
    write_atomic(file, b"one")
    write_atomic(file, b"two")
    assert file.read_bytes() == b"two"
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function):
    file = tmp_path / "a.json"
    write_atomic(file, b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", b"new")
    assert not list(tmp_path.iterdir())


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name in real:
        monkeypatch.setattr(
            os, name, lambda *arguments, name=name: (calls.append(name), real[name](*arguments))
        )
    write_atomic(tmp_path / "a", b"new")
    assert calls == ["fsync", "replace"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "a", b"new")


def test_json_has_no_number_that_is_none():
    value = {
        "a": math.nan,
        "b": [1.5, -math.inf, {"c": (math.inf, np.float64("nan"))}],
        "d": None,
        "e": "NaN",
        "f": True,
        "g": 3,
    }
    assert json_text(value) == (
        '{"a": null, "b": [1.5, null, {"c": [null, null]}], "d": null, "e": "NaN", "f": '
        'true, "g": 3}'
    )
    assert json_text({"a": "路", "b": math.nan}, 1, False) == '{\n "a": "路",\n "b": null\n}'


def test_every_file_of_json_is_written_by_the_standard():
    """json.dumps writes NaN unless it is told not to."""
    package = Path(__file__).parents[1] / "pangu_locmoe"
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if "json.dumps(" in file.read_text(encoding="utf-8")
    }
    # Of whole numbers and text alone: names of slices, a fingerprint, messages, the schema, what
    # two of our processes tell each other.
    assert found == {
        "files.py",
        "checkpoint/shards.py",
        "data/prepared.py",
        "data/tokenizer.py",
        "expert_load/importing/megatron.py",
        "config/__init__.py",
        "check/check.py",
        "check/compile.py",
        "check/dry_run/process.py",
        "check/dry_run/step.py",
        "report/tables.py",
    }
