"""One undisturbed run, what it learns and what it writes; and one that is stopped and killed on
the way, which comes to the same.
"""

from __future__ import annotations

import json
import math
import random
import re
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from support import tiny
from tensorboardX.proto.event_pb2 import Event

from pangu_locmoe.checkpoint.format import latest_whole_checkpoint, read_arrays, read_state
from pangu_locmoe.checkpoint.restore import restore_generator
from pangu_locmoe.cli import main
from pangu_locmoe.config import SampleConfig, load_config
from pangu_locmoe.moe.capacity import bound_capacity, capacity_bounds
from pangu_locmoe.train.schedule import learning_rate

TRAINING_FIELDS = {
    "step",
    "loss",
    "cross_entropy",
    "balance_loss",
    "locality_loss",
    "z_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "step_seconds",
    "capacity",
    "dropped_fraction",
    "max_over_mean_load",
    "local_fraction",
    "experts_per_token",
    "unrouted_fraction",
    "delta",
}
VALIDATION_FIELDS = {
    "step",
    "measured_on",
    "validation_loss_interval",
    "validation_loss",
    "bits_per_byte",
    "validation_loss_by_domain",
    "bits_per_byte_by_domain",
}


@pytest.fixture(scope="module")
def run_dir():
    return tiny.reference_run()


@pytest.fixture(scope="module")
def training(run_dir):
    return [row for row in tiny.rows(run_dir, timing=True) if "loss" in row]


@pytest.fixture(scope="module")
def validation(run_dir):
    return [row for row in tiny.rows(run_dir) if "validation_loss" in row]


def test_the_loss_falls(training, validation):
    losses = [row["cross_entropy"] for row in training]
    # Untrained, every token is as likely as any other.
    assert losses[0] == pytest.approx(math.log(400), abs=0.1)
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert validation[-1]["validation_loss"] < 0.7 * math.log(400)


def test_a_training_row_for_each_step_with_every_field(training):
    config = tiny.reference_config()
    assert [row["step"] for row in training] == list(range(1, 41))
    for row in training:
        assert set(row) == TRAINING_FIELDS
        # Of locmoe_plus alone: here a token has one expert.
        assert row.pop("experts_per_token") is row.pop("unrouted_fraction") is None
        assert all(
            isinstance(value, (int, float)) and math.isfinite(value) for value in row.values()
        )
        assert row["learning_rate"] == pytest.approx(learning_rate(config.train, row["step"]))
        assert row["tokens_per_second"] == pytest.approx(8 * 32 / row["step_seconds"])


def test_the_loss_is_the_sum_of_its_parts(training):
    for row in training:
        parts = row["cross_entropy"] + row["balance_loss"] + row["locality_loss"] + row["z_loss"]
        assert row["loss"] == pytest.approx(parts, rel=1e-6)
        assert row["balance_loss"] > 0 and row["locality_loss"] > 0


def test_validation_rows(validation):
    assert [row["step"] for row in validation] == [10, 20, 30, 40]
    for row in validation:
        assert set(row) == VALIDATION_FIELDS
        assert (
            list(row["validation_loss_by_domain"])
            == list(row["bits_per_byte_by_domain"])
            == list(tiny.DOMAINS)
        )


def test_the_capacity_is_measured_once_and_fixed(run_dir, training):
    """The `bound` policy: an event after the warm-up, the factor's capacity before it and the
    bound's after it.
    """
    (event,) = [row for row in tiny.rows(run_dir) if "event" in row]
    assert (event["event"], event["step"]) == ("capacity", 7)
    (layer,) = event["layers"]
    assert set(layer) == {
        "layer",
        "delta",
        "exact",
        "erfc",
        "exponential",
        "floor",
        "set_by",
        "capacity",
    }
    assert layer["layer"] == 1
    bounds = capacity_bounds(32, 4, layer["delta"])
    assert [layer[name] for name in ("exact", "erfc", "exponential")] == [
        bounds.exact,
        bounds.erfc,
        bounds.exponential,
    ]
    upper = math.ceil(1.25 * 8 * 32 / 4)
    assert layer["capacity"] == bound_capacity(bounds, upper, layer["floor"]) < upper
    # The floor is the smallest capacity that drops a fifth or less of what the step has routed.
    assert layer["set_by"] == ("max_drop" if layer["floor"] > bounds.exact else "bound")
    load_E = tiny.trace(run_dir)["load"][6, 0]
    assert (
        np.maximum(load_E - layer["floor"], 0).sum()
        <= 0.2 * 256
        < np.maximum(load_E - layer["floor"] + 1, 0).sum()
    )
    assert [row["capacity"] for row in training] == [upper] * 7 + [layer["capacity"]] * 33
    # The row of the same step states the same statistic.
    assert training[6]["delta"] == pytest.approx(layer["delta"], abs=1e-7)


def test_the_trace_agrees_with_the_rows(run_dir, training):
    trace = tiny.trace(run_dir)
    assert trace["step"].tolist() == list(range(1, 41))
    assert trace["source"].shape == (40, 1, 2, 4)
    np.testing.assert_array_equal(trace["load"], trace["source"].sum(2))
    # Every node reads 4 sequences of 32 tokens.
    assert (trace["source"].sum(3) == 4 * 32).all()
    capacity = np.array([row["capacity"] for row in training])[:, None, None]
    np.testing.assert_array_equal(trace["dropped"], np.maximum(trace["load"] - capacity, 0))
    assert trace["dropped"].sum() > 0
    for row, load, dropped, source in zip(
        training, trace["load"], trace["dropped"], trace["source"]
    ):
        assert row["dropped_fraction"] == pytest.approx(dropped.sum() / 256)
        assert row["max_over_mean_load"] == pytest.approx(load.max() / 64)
        # Node 0 holds experts 0 and 1, node 1 the others.
        assert row["local_fraction"] == pytest.approx(
            (source[0, 0, :2].sum() + source[0, 1, 2:].sum()) / 256
        )


def test_tensorboard_holds_the_same_numbers(run_dir, training, validation):
    scalars = {}
    for file in (run_dir / "tensorboard").iterdir():
        for event in _events(file.read_bytes()):
            scalars.update(
                ((value.tag, event.step), value.simple_value) for value in event.summary.value
            )
    for row in training:
        for name in ("loss", "grad_norm", "learning_rate", "dropped_fraction"):
            assert scalars[f"train/{name}", row["step"]] == pytest.approx(row[name], rel=1e-6)
    for row in validation:
        assert scalars["validation/validation_loss", row["step"]] == pytest.approx(
            row["validation_loss"], rel=1e-6
        )
        assert scalars["validation/bits_per_byte_by_domain/zh", row["step"]] == pytest.approx(
            row["bits_per_byte_by_domain"]["zh"], rel=1e-6
        )


def test_the_newest_checkpoints_and_the_best_are_kept(run_dir, validation):
    best = min(validation, key=lambda row: row["validation_loss"])["step"]
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in sorted({best, 35, 40})]
    assert read_state(latest_whole_checkpoint(run_dir))["best"]["step"] == best


def test_the_summary_and_the_configuration(run_dir, validation):
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert {key: summary["final"][key] for key in VALIDATION_FIELDS} == validation[-1]
    assert set(summary["bigram_bits_per_byte"]) == {*tiny.DOMAINS, "all"}
    time_spent = summary["wall_time"]
    assert (time_spent["starts"], time_spent["lost"], time_spent["restarts"]) == (1, 0, 0)
    assert time_spent["steps"] > 0 < time_spent["checkpoints"] and time_spent["compile"] > 0
    assert load_config(run_dir / "config.yaml") == tiny.reference_config()
    assert (run_dir / "report.html").stat().st_size > 1000


def _events(data: bytes):
    """The events of a TensorBoard file: length, checksum, message, checksum, and so on."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_the_model_continues_chinese_without_broken_characters(run_dir):
    generator = restore_generator(run_dir)
    text = generator(["路由把每个词元"], [1], SampleConfig(tokens=24, temperature=0), 1)[0]
    assert text and "\ufffd" not in text
    pieces = list(
        generator.stream(["路由把每个词元"], [1], SampleConfig(tokens=24, temperature=0), 1)
    )
    assert "".join(piece for (piece,) in pieces) == text


def start(config_file: Path, run_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    arguments = ("train", config_file, "--run-dir", run_dir, "--resume", "auto", "--no-progress")
    return subprocess.Popen(
        tiny.command(*arguments),
        env=tiny.environment(),
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
    )


def last_step(run_dir: Path) -> int:
    """The last step in the metrics, 0 without."""
    file = run_dir / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+)', file.read_text(encoding="utf-8")) if file.exists() else []
    return int(steps[-1]) if steps else 0


def wait_for_step(process: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    for _ in range(18000):
        if last_step(run_dir) >= step or process.poll() is not None:
            return
        time.sleep(0.01)
    raise AssertionError(f"the run did not come to step {step} in three minutes")


def assert_same_run(run_dir: Path, undisturbed: Path) -> None:
    """Rows, trace and weights are the same, bit by bit."""
    assert tiny.rows(run_dir) == tiny.rows(undisturbed)
    wanted = tiny.trace(undisturbed)
    for name, array in tiny.trace(run_dir).items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    for file in ("model.safetensors", "optimizer.safetensors"):
        arrays = read_arrays(latest_whole_checkpoint(run_dir) / file)
        for name, array in read_arrays(latest_whole_checkpoint(undisturbed) / file).items():
            np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {
        path.name for path in (undisturbed / "checkpoints").iterdir()
    }


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_terminated_and_killed_equals_an_undisturbed_one(run_dir, tmp_path, kills):
    undisturbed = run_dir
    config_file = tiny.write(tiny.reference_config(), tmp_path)
    run_dir = tmp_path / "run"
    log = tmp_path / "log"
    process = start(config_file, run_dir, log)
    wait_for_step(
        process, run_dir, 1
    )  # 39 steps and their evaluations are left, however busy the machine is
    process.terminate()
    assert process.wait(timeout=300) == 128 + signal.SIGTERM
    said = log.read_text()
    stopped = re.search(
        r"stopped by SIGTERM after step (\d+), state saved; continue with --resume auto --run-dir",
        said,
    )
    assert stopped and "Traceback" not in said, said[-1500:] + str(last_step(run_dir))
    assert latest_whole_checkpoint(run_dir).name == f"step-{int(stopped[1]):08d}"
    assert last_step(run_dir) == int(stopped[1]) < 40
    moments = []
    for number in range(kills):
        # Later each time; the pause puts the kill anywhere within a step or a checkpoint.
        step = 6 + int(30 / kills * (number + random.random()))
        pause = random.uniform(0, 0.05)
        moments.append((step, pause))
        process = start(config_file, run_dir, log)
        wait_for_step(process, run_dir, step)
        time.sleep(pause)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0), f"{moments}: {log.read_text()}"
        assert last_step(run_dir) >= step, f"{moments}: {log.read_text()}"
    assert (
        main(
            [
                "train",
                str(config_file),
                "--run-dir",
                str(run_dir),
                "--resume",
                "auto",
                "--no-progress",
            ]
        )
        == 0
    )
    assert log.read_text().count("resuming after step") == kills, f"{moments}: {log.read_text()}"
    assert_same_run(run_dir, undisturbed)
    assert_time_adds_up(run_dir, starts=kills + 2)


def assert_time_adds_up(run_dir: Path, starts: int) -> None:
    """One process was stopped with its state saved, the others were killed."""
    spent = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["wall_time"]
    parts = list(spent.values())[:9]
    assert spent["starts"] == starts and min(parts) >= 0 < spent["down"]
    assert sum(parts) == pytest.approx(spent["observed"])
    assert 0 < spent["training_overhead_ratio"] < 1
    resumed = spent["prepare"] + spent["steps"] + spent["restarts"] + spent["lost"]
    assert resumed < spent["observed"] and 0 <= spent["steps_done_twice"] < 40
