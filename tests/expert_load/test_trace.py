"""The load trace: rows in, arrays out, going on after an interruption, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.trace import (
    FLUSH_FRACTION,
    FLUSH_SECONDS,
    Trace,
    TraceWriter,
    read_trace,
    write_trace,
)


def row(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Load [2 layers, 3 nodes, 4 experts] and drops [2, 4] of a step."""
    random = np.random.default_rng(step)
    return random.integers(0, 50, (2, 3, 4)), random.integers(0, 5, (2, 4))


def fill(writer: TraceWriter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        writer.add(step, *row(step))
    writer.flush()


def arrays(trace: Trace) -> dict[str, np.ndarray]:
    found = {
        "step": trace.step_W,
        "load": trace.load_WLE,
        "dropped": trace.dropped_WLE,
        "source": trace.source_WLNE,
    }
    return {name: array for name, array in found.items() if array is not None}


def assert_equal(first: Trace, second: Trace) -> None:
    assert arrays(first).keys() == arrays(second).keys()
    for name, array in arrays(first).items():
        np.testing.assert_array_equal(array, arrays(second)[name], err_msg=name)


def test_what_is_written_is_read(tmp_path):
    fill(TraceWriter(tmp_path / "load.npz"), 1, 200)
    trace = read_trace(tmp_path / "load.npz")
    assert {name: (array.dtype.name, array.shape) for name, array in arrays(trace).items()} == {
        "step": ("int64", (200,)),
        "load": ("int32", (200, 2, 4)),
        "dropped": ("int32", (200, 2, 4)),
        "source": ("int32", (200, 2, 3, 4)),
    }
    assert trace.step_W.tolist() == list(range(1, 201))
    for index in range(200):
        load_LNE, dropped_LE = row(index + 1)
        np.testing.assert_array_equal(trace.source_WLNE[index], load_LNE)
        np.testing.assert_array_equal(trace.load_WLE[index], load_LNE.sum(1))
        np.testing.assert_array_equal(trace.dropped_WLE[index], dropped_LE)


def test_every_third_step_from_the_first(tmp_path):
    fill(TraceWriter(tmp_path / "load.npz", every=3), 1, 11)
    assert read_trace(tmp_path / "load.npz").step_W.tolist() == [1, 4, 7, 10]


def test_it_ends_when_full(tmp_path):
    writer = TraceWriter(tmp_path / "load.npz", every=2, max_rows=3)
    for step in range(1, 21):
        writer.add(step, *row(step))
    assert read_trace(tmp_path / "load.npz").step_W.tolist() == [
        1,
        3,
        5,
    ]  # before any flush by the caller
    writer.flush()
    assert read_trace(tmp_path / "load.npz").step_W.tolist() == [1, 3, 5]


@pytest.mark.parametrize("every, max_rows", [(1, None), (2, None), (1, 6), (3, 2)])
def test_going_on_equals_never_having_stopped(tmp_path, every, max_rows):
    fill(TraceWriter(tmp_path / "whole.npz", every, max_rows), 1, 10)
    # Stopped after step 7 with a checkpoint at step 4.
    fill(TraceWriter(tmp_path / "parts.npz", every, max_rows), 1, 7)
    fill(TraceWriter(tmp_path / "parts.npz", every, max_rows, last_step=4), 5, 10)
    assert_equal(read_trace(tmp_path / "parts.npz"), read_trace(tmp_path / "whole.npz"))


def test_a_new_run_forgets_an_old_file(tmp_path):
    fill(TraceWriter(tmp_path / "load.npz"), 1, 7)
    fill(TraceWriter(tmp_path / "load.npz"), 1, 2)
    assert read_trace(tmp_path / "load.npz").step_W.tolist() == [1, 2]


def test_a_run_does_not_go_on_from_a_trace_without_sources(tmp_path):
    write_trace(tmp_path / "load.npz", Trace(np.arange(1, 3), np.ones((2, 1, 4), np.int32)))
    with pytest.raises(DataError, match="not the trace of a run"):
        TraceWriter(tmp_path / "load.npz", last_step=1)


def test_nothing_is_written_without_rows(tmp_path):
    TraceWriter(tmp_path / "load.npz").flush()
    assert not list(tmp_path.iterdir())


def test_counts_may_change_after_they_were_added(tmp_path):
    """A row is a copy: the caller may use its arrays again."""
    writer = TraceWriter(tmp_path / "load.npz")
    load_LNE, dropped_LE = (array.astype(np.int32) for array in row(1))
    writer.add(1, load_LNE, dropped_LE)
    load_LNE[:], dropped_LE[:] = -1, -1
    writer.flush()
    np.testing.assert_array_equal(read_trace(tmp_path / "load.npz").source_WLNE[0], row(1)[0])


class Clock:
    """Each step takes 1 s, and each look at the clock while a file is written `write` s."""

    def __init__(self) -> None:
        self.now = 0.0
        self.write = 0.0

    def __call__(self) -> float:
        self.now += self.write
        return self.now


def test_it_is_written_by_time_and_writing_stays_a_small_part_of_it(tmp_path):
    clock = Clock()
    file = tmp_path / "load.npz"
    writer = TraceWriter(file, clock=clock)
    written = []
    for step in range(1, 501):
        clock.now += 1
        before = file.stat().st_mtime_ns if file.exists() else 0
        writer.add(step, *row(step))
        if file.exists() and file.stat().st_mtime_ns != before:
            written.append(step)
            assert read_trace(file).step_W[-1] == step
    assert written == list(range(int(FLUSH_SECONDS), 501, int(FLUSH_SECONDS)))

    clock.write = (
        2 * FLUSH_SECONDS * FLUSH_FRACTION
    )  # as if the file had become large: one look at the clock costs as much
    writer.flush()
    start = clock.now
    spent = 0.0
    clock.write = 0.0
    for step in range(501, 501 + int(2 * FLUSH_SECONDS) - 1):
        clock.now += 1
        before = file.stat().st_mtime_ns
        writer.add(step, *row(step))
        spent += file.stat().st_mtime_ns != before
    assert spent == 0 and clock.now - start < 2 * FLUSH_SECONDS
    clock.now += 1
    writer.add(10_000, *row(1))
    assert read_trace(file).step_W[-1] == 10_000


def test_a_killed_run_keeps_its_rows(tmp_path):
    """kill -9 while the trace is written again and again, without any flush by the caller: what
    is there is a whole trace.
    """
    code = (
        "import itertools, sys, time, numpy as np; from pathlib import Path; from "
        "pangu_locmoe.expert_load import trace\n"
        "trace.FLUSH_SECONDS, trace.FLUSH_FRACTION = 0.0, 1.0\n"
        "writer = trace.TraceWriter(Path(sys.argv[1]))\n"
        "for step in itertools.count(1):\n"
        "    writer.add(step, np.full((2, 3, 4), step), np.zeros((2, 4)))\n"
        "    time.sleep(0.001)\n"
    )
    file = tmp_path / "load.npz"
    process = subprocess.Popen([sys.executable, "-c", code, str(file)])
    try:
        deadline = time.monotonic() + 60
        seen = 0
        while seen < 100 and time.monotonic() < deadline:
            time.sleep(0.05)
            seen = len(read_trace(file).step_W) if file.exists() else 0
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    trace = read_trace(file)
    assert len(trace.step_W) >= seen >= 100 and trace.step_W.tolist() == list(
        range(1, len(trace.step_W) + 1)
    )
    np.testing.assert_array_equal(trace.load_WLE[:, 0, 0], 3 * trace.step_W)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_trace_comes_back(tmp_path_factory, data):
    rows, layers, nodes, experts = (data.draw(st.integers(1, 4)) for _ in range(4))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    source = random.integers(
        0,
        data.draw(st.sampled_from([1, 100, 2**40])),
        (rows, layers, nodes, experts),
        endpoint=True,
    )
    step = np.cumsum(random.integers(1, 9, rows))
    load = source.sum(2)
    trace = Trace(
        step,
        load,
        load // 2 if data.draw(st.booleans()) else None,
        source if data.draw(st.booleans()) else None,
    )
    file = tmp_path_factory.mktemp("trace") / "load.npz"
    write_trace(file, trace)
    assert_equal(read_trace(file), trace)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "load.npz"
    fill(TraceWriter(file), 1, 3)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        fill(TraceWriter(file), 1, 9)
    assert read_trace(file).step_W.tolist() == [1, 2, 3] and [
        path.name for path in tmp_path.iterdir()
    ] == ["load.npz"]


def test_whole_floats_and_small_integers_are_counts(tmp_path):
    np.savez(
        tmp_path / "load.npz",
        step=np.array([1.0, 5.0]),
        load=np.full((2, 1, 3), 200, np.uint8),
        other=np.array(["x"]),
    )
    trace = read_trace(tmp_path / "load.npz")
    assert trace.step_W.dtype == np.int64 and trace.load_WLE.dtype == np.int64
    assert trace.step_W.tolist() == [1, 5] and trace.load_WLE.tolist() == [[[200] * 3]] * 2
    assert trace.dropped_WLE is None and trace.source_WLNE is None


GOOD = {
    "step": np.array([1, 2, 4]),
    "load": np.full((3, 2, 4), 6),
    "dropped": np.zeros((3, 2, 4)),
    "source": np.full((3, 2, 3, 4), 2),
}


def changed(name: str, index: tuple[int, ...], value: float) -> np.ndarray:
    array = GOOD[name].astype(float)
    array[index] = value
    return array


@pytest.mark.parametrize(
    "change, words",
    [
        ({"step": None}, r"needs step \[rows\] and load \[rows, layers, experts\], has "),
        ({"load": None}, r"needs step \[rows\]"),
        ({"load": np.full((3, 8), 6)}, r"needs step \[rows\]"),
        ({"step": np.arange(4)}, r"needs step \[rows\].* step \[4\]"),
        ({"load": np.zeros((3, 0, 4)), "dropped": None, "source": None}, "load is empty"),
        ({"dropped": np.zeros((3, 2, 3))}, r"dropped has shape \(3, 2, 3\)"),
        ({"source": np.full((3, 2, 4), 6)}, "source has shape"),
        ({"source": np.full((3, 2, 3, 5), 2)}, "source has shape"),
        ({"source": changed("source", (2, 1, 2, 3), 3)}, "source, summed over nodes, is not load"),
        ({"load": changed("load", (0, 1, 2), -1)}, "load holds a number below 0"),
        ({"dropped": changed("dropped", (0, 0, 0), -1)}, "dropped holds a number below 0"),
        ({"load": changed("load", (0, 1, 2), 5.5)}, "load holds numbers that are not whole"),
        ({"load": changed("load", (0, 1, 2), np.nan)}, "load holds numbers that are not whole"),
        ({"load": changed("load", (0, 1, 2), np.inf)}, "load holds numbers that are not whole"),
        ({"load": changed("load", (0, 1, 2), 1e17)}, "load holds a number above"),
        ({"load": np.full((3, 2, 4), True)}, "load holds bool"),
        ({"load": np.full((3, 2, 4), "6")}, "load holds <U1"),
        ({"step": np.array([1, 2, 2])}, "steps do not rise"),
        ({"step": np.array([1, 3, 2])}, "steps do not rise"),
        ({"step": np.array([-1, 3, 4])}, "step holds a number below 0"),
        ({"step": np.array([None, 1, 2])}, "Object arrays cannot be loaded"),
    ],
)
def test_wrong_arrays_are_named_in_one_line(tmp_path, change, words):
    file = tmp_path / "load.npz"
    np.savez(file, **GOOD)
    read_trace(file)
    np.savez(
        file, **{name: array for name, array in {**GOOD, **change}.items() if array is not None}
    )
    with pytest.raises(DataError, match=f"^{file}: not a load trace: .*{words}") as caught:
        read_trace(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut off"])
def test_what_is_no_trace_is_named(tmp_path, content):
    file = tmp_path / "load.npz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file}: not a load trace: "):
        read_trace(file)


def test_other_files_are_no_trace(tmp_path):
    with pytest.raises(DataError, match=r"absent\.npz: not a load trace: it does not exist"):
        read_trace(tmp_path / "absent.npz")
    with pytest.raises(DataError, match=r"load\.npz: not a load trace: it does not exist"):
        read_trace(tmp_path)  # a folder is taken for a run directory
    np.save(tmp_path / "load.npy", np.arange(3))
    with pytest.raises(DataError, match="one array"):
        read_trace(tmp_path / "load.npy")
    with zipfile.ZipFile(tmp_path / "load.npz", "w") as archive:
        archive.writestr("load.npy", "not an array")
    with pytest.raises(DataError, match="not a load trace"):
        read_trace(tmp_path / "load.npz")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_refused_or_harmless(tmp_path_factory, data):
    """Cut anywhere, or one byte changed: DataError, or the same trace if the byte does not
    matter.
    """
    folder = tmp_path_factory.mktemp("trace")
    file = folder / "load.npz"
    fill(TraceWriter(file), 1, 20)
    content = file.read_bytes()
    whole = read_trace(file)
    place = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.booleans())
    file.write_bytes(
        content[:place]
        if cut
        else content[:place]
        + bytes([content[place] ^ data.draw(st.integers(1, 255))])
        + content[place + 1 :]
    )
    try:
        found = read_trace(file)
    except DataError as error:
        assert str(error).startswith(f"{file}: not a load trace: ") and "\n" not in str(error)
    else:
        assert not cut
        for name, array in arrays(found).items():
            np.testing.assert_array_equal(array, arrays(whole)[name])


def test_shares_stride_and_a_part_of_the_steps():
    trace = Trace(np.array([10, 20, 30]), np.array([[[1, 3]], [[0, 0]], [[2, 2]]]))
    assert trace.share_WLE.tolist() == [[[0.25, 0.75]], [[0.5, 0.5]], [[0.5, 0.5]]]
    assert (
        trace.stride == 10
        and trace.between(20, 30).step_W.tolist() == [20]
        and trace.between(11, 99).load_WLE.shape == (2, 1, 2)
    )
