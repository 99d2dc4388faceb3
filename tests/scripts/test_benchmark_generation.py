"""The benchmark of generation: flags, and what it says of the numbers; nothing is timed here."""

from __future__ import annotations

import pytest
from benchmark import generation


def result() -> dict:
    """Two windows, three rounds."""
    whole, kept = generation.WHOLE, generation.CACHED
    return {
        "machine": {
            "processor": "x",
            "cores": 2,
            "mindspore": "2",
            "load_before": (0.5, 0, 0),
            "load_after": (1.5, 0, 0),
        },
        "seed": 1,
        "rounds": 3,
        "tokens": 4,
        "tokens_per_second": {
            64: {whole: [20.0, 25.0, 10.0], kept: [100.0, 200.0, 50.0]},
            512: {whole: [5.0, 4.0, 2.0], kept: [80.0, 100.0, 50.0]},
        },
        "cpu_ms_per_token": {
            64: {whole: [50.0, 40.0, 45.0], kept: [10.0, 8.0, 9.0]},
            512: {whole: [250.0, 240.0, 260.0], kept: [12.0, 12.0, 9.0]},
        },
        "prompt_ms": {64: [30.0, 31.0, 32.0], 512: [200.0, 210.0, 220.0]},
    }


def test_ratios_are_formed_inside_a_round():
    said = generation.report(result())
    row = "| 512 | 4.0 (2.0-5.0) | 80 (50-100) | 25.0 (16.0-25.0) | 250 (240-260) | 12.0 (9.0-12.0)"
    assert row in said
    end = "kept, a token at 512 over one at 64: time 1.25 (1.00-2.00), CPU time 1.20 (1.00-1.50)"
    assert said.endswith(end)
    assert "load average 0.5 before and 1.5 after; seed 1, 3 rounds of 4 tokens" in said


def test_windows_are_sizes(capsys):
    assert generation.parse_arguments(["--windows", "512,64"]).windows == [64, 512]
    with pytest.raises(SystemExit) as left:
        generation.parse_arguments(["--windows", "64,few"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "argument --windows: must be sizes as 64,512" in error and len(error.splitlines()) == 1
