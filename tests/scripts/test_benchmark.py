"""The benchmark's line protocol, flags and ratios; nothing is timed here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import List

import pytest
from benchmark import hf, ours, run

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


class FakeTrainer:
    parameters = 12
    versions = {"fake": "1"}  # noqa: RUF012

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> float:
        self.steps += 1
        return float(self.steps)


def test_a_trainer_answers_line_by_line() -> None:
    trainer = FakeTrainer()
    said: List[str] = []
    hf.serve(trainer, ["run 3\n", "\n", "run 0\n", "walk 2\n", "quit\n", "run 5\n"], said.append)
    assert trainer.steps == 4  # the first step and the three asked for; nothing after quit
    ready = run.parse_ready(said[0])
    assert (ready["parameters"], ready["versions"]) == (12, {"fake": "1"})
    answer = json.loads(said[1])
    assert (answer["steps"], answer["loss"]) == (3, 4.0)
    assert {"wall_seconds", "cpu_seconds", "peak_memory_mb"} <= set(answer)
    assert ["'run 0'" in said[2], "'walk 2'" in said[3], len(said)] == [True, True, 4]


def test_a_line_that_is_not_ready_is_an_error() -> None:
    with pytest.raises(run.BenchmarkError, match="expected 'ready"):
        run.parse_ready("hello\n")


def test_ratios_are_formed_inside_a_round() -> None:

    def rounds(seconds: List[float], others: List[float]) -> list:
        return [
            {"wall_seconds": 2 * s, "steps": 2, "cores_of_others": o}
            for s, o in zip(seconds, others)
        ]

    answers = {
        "hf": rounds([1.0, 4.0, 3.0], [0.0, 1.0, 0.0]),
        "switch-5/4": rounds([2.0, 4.0, 2.0], [0.1, 0.0, 0.9]),
    }
    ratios = run.ratios(answers)
    assert list(ratios) == ["speed: switch-5/4 vs hf"]
    ratio = ratios["speed: switch-5/4 vs hf"]
    assert ratio["rounds"] == [0.5, 1.0, 1.5]
    assert (ratio["min"], ratio["median"], ratio["max"], ratio["best"]) == (0.5, 1.0, 1.5, 0.5)
    assert (ratio["quiet_rounds"], ratio["quiet_median"]) == (1, 0.5)


def test_every_ratio_has_its_sides() -> None:
    names = {side.name for side in run.SIDES}
    assert {name for _, *pair in run.RATIOS for name in pair} <= names


def test_the_flags_of_every_side_are_known_and_ours_are_valid_configurations() -> None:
    from pangu_locmoe.config import parse_config

    for side in run.SIDES + run.MEMORY_SIDES:
        if side.hugging_face:
            assert hf.parse_arguments(side.flags).hidden in (256, 512)
        else:
            config = parse_config(ours.run_config(ours.parse_arguments(side.flags)))
            assert config.model.num_layers in (4, 5)


@pytest.mark.parametrize(
    "script, flags",
    [
        (run, ["--rounds", "0"]),
        (run, ["--sides", "torch"]),
        (run, ["--output", "no/such/folder/file.json"]),
        (run, ["--round", "3"]),
        (ours, ["--gate", "256,7"]),
        (hf, ["--implementation", "fast"]),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(
    script: ModuleType, flags: List[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit_:
        script.parse_arguments(flags)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flags[0] in error


@pytest.mark.parametrize(
    "flags",
    [
        ["--rounds", "0"],
        ["--rounds"],
        ["--fast"],
        ["--output", "no/such/folder/file.json"],
        ["--python", "no-such-python"],
    ],
)
def test_the_shell_script_refuses_a_bad_flag_before_it_installs(flags: List[str]) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPTS / "benchmark.sh"), *flags], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert flags[0] in done.stderr


def test_the_shell_script_has_help() -> None:
    done = subprocess.run(
        ["bash", str(SCRIPTS / "benchmark.sh"), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert all(
        flag in done.stdout
        for flag in ("--rounds", "--steps", "--output", "--python", "--hf-python", "--torch-index")
    )
