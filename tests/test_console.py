"""What is printed never decides what becomes of a run."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys

import pytest
from support import tiny
from tqdm import tqdm

from pangu_locmoe import console
from pangu_locmoe.errors import LocMoEError


class Broken(io.StringIO):
    """A terminal that is gone."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.calls = 0

    def write(self, text):
        self.calls += 1
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        raise self.error


ERRORS = [
    OSError(errno.EIO, "gone"),
    BrokenPipeError(errno.EPIPE, "pipe"),
    OSError(errno.ENOSPC, "full"),
    ValueError("I/O operation on closed file"),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_prints_and_bars_do_not_fail(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error))
    with console.forgiving():
        print("text", flush=True)
        print("text", file=sys.stderr)
        with tqdm(total=3, disable=None) as quiet, tqdm(total=3) as bar:
            for one in (quiet, bar):
                one.update()
                one.write("text")
        assert not sys.stderr.isatty()


def test_output_that_a_command_is_for_is_missed(monkeypatch):
    for error, raised in zip(ERRORS, (LocMoEError, BrokenPipeError, LocMoEError, LocMoEError)):
        monkeypatch.setattr(sys, "stdout", Broken(error))
        with pytest.raises(raised), console.forgiving(False):
            print("text")


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("output_too", [True, False])
def test_what_an_encoding_lacks_is_escaped(monkeypatch, encoding, output_too):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with console.forgiving(output_too):
        print("a \ufffd \u8def \udcff")
    text = raw.getvalue().decode(encoding)
    assert text.startswith("a ") and text.endswith("\\udcff\n")


def test_streams_that_are_missing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with console.forgiving():
        print("text", flush=True)
        with tqdm(total=2) as bar:
            bar.update()
    assert sys.stdout is None


SMALL = """
import sys; from pangu_locmoe import console
with console.forgiving({too}):
    print("x" * 100000); f = open(sys.argv[1], "w"); import os; os.write(1, b"lib"); f.write("ours"); f.close()
"""


@pytest.mark.parametrize("output", ["closed", "full", "reader gone"])
def test_a_process_ends_well(tmp_path, output):
    redirect = {
        "closed": ">&- 2>&-",
        "full": ">/dev/full 2>/dev/full",
        "reader gone": "2>/dev/full | true",
    }[output]
    command = f'"$0" -c "$1" "$2" {redirect}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, SMALL.format(too=True), tmp_path / "file"],
        env=tiny.environment(),
        timeout=120,
    )
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "ours"


def test_a_full_disk_behind_a_commands_output_is_one_line():
    command = (
        '"$0" -m pangu_locmoe capacity --hidden-size 8 --num-experts 2 --cosine 0.5 >/dev/full'
    )
    done = subprocess.run(
        ["bash", "-c", command, sys.executable],
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (
        2,
        f"pangu-locmoe: standard output cannot be written: {os.strerror(errno.ENOSPC)}\n",
    )
