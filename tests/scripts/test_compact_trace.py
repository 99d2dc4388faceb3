"""The traces that tests use: the same counts in 16 bits."""

from __future__ import annotations

import compact_trace
import numpy as np
import pytest

from pangu_locmoe.expert_load.trace import read_trace


def write(path, most, **more):
    load_WLE = np.random.default_rng(1).integers(0, 9, size=(6, 2, 4))
    load_WLE[3, 1, 2] = most
    np.savez(path, step=np.arange(1, 7), load=load_WLE, **more)


@pytest.mark.parametrize("names", [(), ("dropped",)])
def test_counts_stay(tmp_path, capsys, names):
    path, output = tmp_path / "load.npz", tmp_path / "small.npz"
    write(path, 65_535, **{name: np.zeros((6, 2, 4), int) for name in names})
    assert compact_trace.main([str(path), str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 6 rows, ")
    with np.load(output) as small:
        assert small["load"].dtype == np.uint16
        assert set(small) == {"step", "load", *names}
    before, after = read_trace(path), read_trace(output)
    np.testing.assert_array_equal(before.load_WLE, after.load_WLE)
    np.testing.assert_array_equal(before.step_W, after.step_W)


def test_counts_that_do_not_fit_are_refused(tmp_path, capsys):
    path, output = tmp_path / "load.npz", tmp_path / "small.npz"
    write(path, 65_536)
    assert compact_trace.main([str(path), str(output)]) == 1
    error = capsys.readouterr().err
    assert "65536 tokens in a step: more than 16 bits hold" in error and error.count("\n") == 1
    assert not output.exists()
