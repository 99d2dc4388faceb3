"""The load trace: rows in, arrays out, and going on after an interruption."""

from __future__ import annotations

import numpy as np
import pytest

from pangu_locmoe.errors import DataError
from pangu_locmoe.load.trace import TraceWriter, read_trace


def row(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Load [2 layers, 3 nodes, 4 experts] and drops [2, 4] of a step."""
    random = np.random.default_rng(step)
    return random.integers(0, 50, (2, 3, 4)), random.integers(0, 5, (2, 4))


def fill(writer: TraceWriter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        writer.add(step, *row(step))
    writer.flush()


def test_what_is_written_is_read(tmp_path):
    fill(TraceWriter(tmp_path / "load.npz"), 1, 5)
    trace = read_trace(tmp_path / "load.npz")
    assert {name: (array.dtype.name, array.shape) for name, array in trace.items()} == {
        "step": ("int64", (5,)),
        "load": ("int32", (5, 2, 4)),
        "dropped": ("int32", (5, 2, 4)),
        "source": ("int32", (5, 2, 3, 4)),
    }
    assert trace["step"].tolist() == [1, 2, 3, 4, 5]
    for index in range(5):
        load_LNE, dropped_LE = row(index + 1)
        np.testing.assert_array_equal(trace["source"][index], load_LNE)
        np.testing.assert_array_equal(trace["load"][index], load_LNE.sum(1))
        np.testing.assert_array_equal(trace["dropped"][index], dropped_LE)


def test_every_third_step_from_the_first(tmp_path):
    fill(TraceWriter(tmp_path / "load.npz", every=3), 1, 11)
    assert read_trace(tmp_path / "load.npz")["step"].tolist() == [1, 4, 7, 10]


def test_it_ends_when_full(tmp_path):
    fill(TraceWriter(tmp_path / "load.npz", every=2, max_rows=3), 1, 20)
    assert read_trace(tmp_path / "load.npz")["step"].tolist() == [1, 3, 5]


@pytest.mark.parametrize("every, max_rows", [(1, None), (2, None), (1, 6), (3, 2)])
def test_going_on_equals_never_having_stopped(tmp_path, every, max_rows):
    fill(TraceWriter(tmp_path / "whole.npz", every, max_rows), 1, 10)
    # Stopped after step 7 with a checkpoint at step 4.
    fill(TraceWriter(tmp_path / "parts.npz", every, max_rows), 1, 7)
    fill(TraceWriter(tmp_path / "parts.npz", every, max_rows, last_step=4), 5, 10)
    parts = read_trace(tmp_path / "parts.npz")
    for name, array in read_trace(tmp_path / "whole.npz").items():
        np.testing.assert_array_equal(parts[name], array)


def test_a_new_run_forgets_an_old_file(tmp_path):
    fill(TraceWriter(tmp_path / "load.npz"), 1, 7)
    fill(TraceWriter(tmp_path / "load.npz"), 1, 2)
    assert read_trace(tmp_path / "load.npz")["step"].tolist() == [1, 2]


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
    assert read_trace(tmp_path / "load.npz")["source"].min() >= 0


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut off"])
def test_what_is_no_trace_is_named(tmp_path, content):
    file = tmp_path / "load.npz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file}: not a load trace: "):
        read_trace(file)


def test_a_truncated_trace_is_named(tmp_path):
    file = tmp_path / "load.npz"
    fill(TraceWriter(file), 1, 50)
    for length in (100, file.stat().st_size // 2, file.stat().st_size - 10):
        (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:length])
        with pytest.raises(DataError, match=r"cut\.npz: not a load trace: "):
            read_trace(tmp_path / "cut.npz")


def test_other_arrays_are_no_trace(tmp_path):
    file = tmp_path / "load.npz"
    np.savez(file, step=np.arange(3), load=np.zeros((2, 1, 4)))
    with pytest.raises(DataError, match=r"needs step \[rows\] and load \[rows, layers, experts\]"):
        read_trace(file)
    with pytest.raises(DataError, match="not a load trace"):
        read_trace(tmp_path / "absent.npz")
