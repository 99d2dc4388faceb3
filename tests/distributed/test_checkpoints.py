"""A checkpoint of 4 ranks goes on in 1 process and then on 2 ranks, as if nothing had happened.

By the command line.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from support import runs, tiny

from pangu_locmoe.checkpoint import format as checkpoints
from pangu_locmoe.checkpoint import shards
from pangu_locmoe.cli import main
from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.model.sigma import PanguSigma

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def folder():
    return runs.train_on()


def test_two_ranks_took_up_what_one_process_wrote(folder):
    assert f"resuming after step {2 * runs.EVERY}" in (
        folder / "everyday-2" / "logs" / "worker_0.log"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["four", "one-after-four", "two-after-one"])
def test_the_loss_goes_on(folder, name):
    wanted = tiny.rows(folder / "one")
    got = tiny.rows(folder / name)
    assert [row["step"] for row in got] == [row["step"] for row in wanted]
    for one, other in zip(wanted, got):
        for key in ("loss", "grad_norm", "validation_loss"):
            assert abs(one.get(key, 0) - other.get(key, 0)) <= 1e-5, (
                f"step {one['step']}: {key} {other[key]}, not {one[key]}"
            )


@pytest.mark.parametrize("name", ["four", "one-after-four", "two-after-one"])
def test_weights_and_moments_are_those_of_the_undisturbed_run(folder, name):
    wanted, got = (checkpoints.latest_whole_checkpoint(folder / run) for run in ("one", name))
    for kind in ("model", "optimizer"):
        one = checkpoints.read_shards(wanted, kind)
        other = checkpoints.read_shards(got, kind)
        assert set(one) == set(other)
        for weight in one:
            np.testing.assert_allclose(
                other[weight],
                one[weight],
                rtol=0,
                atol=2e-5 if kind == "model" else 2e-6,
                err_msg=weight,
            )
        if kind == "optimizer":
            assert any(
                np.abs(one[weight]).max() > 5e-5
                for weight in one
                if "adam_m" in weight and ".experts.3." in weight
            )


def test_every_rank_has_written_its_experts_and_nothing_else(folder):
    written = checkpoints.latest_whole_checkpoint(folder / "four")
    for rank in range(4):
        with safe_open(
            written / checkpoints.shard_name("model", rank), framework="numpy"
        ) as archive:
            names = list(archive.keys())
            slices = json.loads(archive.metadata()["slices"])
        # Two replicas of two ranks: a replica has two of the four experts, and each of its ranks
        # half of every one.
        assert {
            int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name
        } == {2 * (rank // 2), 2 * (rank // 2) + 1}
        assert {position for own in slices.values() for _, _, position in own} == {rank % 2}
        assert rank == 0 or set(names) == set(slices)
        assert rank < 2 or all(".experts." in name for name in names)
    assert json.loads((written / "state.json").read_text(encoding="utf-8"))["shards"] == {
        "model": 4,
        "optimizer": 4,
    }


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_a_missing_ranks_file_is_named(folder, tmp_path, capsys, kind):
    copy = tmp_path / "run" / "checkpoints" / f"step-{runs.STEPS:08d}"
    shutil.copytree(checkpoints.latest_whole_checkpoint(folder / "four"), copy)
    file = copy / f"{kind}-rank2.safetensors"
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"^{file} is missing or damaged: [^\n]*$"):
        checkpoints.read_shards(copy, kind)
    shutil.copy(tiny.write(runs.config(nodes=2), tmp_path), tmp_path / "run" / "config.yaml")
    assert (
        main(
            [
                "train",
                str(tmp_path / "config.yaml"),
                "--run-dir",
                str(tmp_path / "run"),
                "--resume",
                "auto",
                "--no-progress",
            ]
        )
        == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"pangu-locmoe: {file} is missing or damaged: ")


def test_one_process_evaluates_what_four_ranks_wrote(folder, capsys):
    assert main(["evaluate", str(folder / "four"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    final = json.loads((folder / "four" / "summary.json").read_text(encoding="utf-8"))["final"]
    assert found["validation_loss"] == pytest.approx(final["validation_loss"], abs=1e-5)


def test_a_checkpoint_without_a_ranks_file_is_passed_over(folder, tmp_path):
    copy = tmp_path / "checkpoints"
    shutil.copytree(folder / "four" / "checkpoints", copy)
    newest, before = sorted(copy.iterdir(), reverse=True)[:2]
    (newest / "optimizer-rank3.safetensors").unlink()
    assert checkpoints.latest_whole_checkpoint(tmp_path) == before


def test_a_rank_reads_only_its_share(folder, monkeypatch):
    """Every array that is read is of its own experts or of nobody's, and is read once."""
    read: list[str] = []
    before = shards.Shards.__getitem__

    def note(self, key):
        read.append(key)
        return before(self, key)

    monkeypatch.setattr(shards.Shards, "__getitem__", note)
    written = checkpoints.latest_whole_checkpoint(folder / "four")
    model = PanguSigma(runs.config(nodes=2))
    for parameter in model.get_parameters():
        if ".experts." in parameter.name:
            parameter.set_data(parameter[1:3].copy(), slice_shape=True)
    for layer in model.moe_layers.values():
        monkeypatch.setattr(type(layer.transport), "held_experts", np.array([1, 2]))
    checkpoints.load_weights(written, model)
    assert {key.split(".experts.")[1].split(".")[0] for key in read if ".experts." in key} == {
        "1",
        "2",
    }
    assert len(read) == len(set(read))
    whole = checkpoints.read_shards(written, "model")
    experts = next(
        parameter for parameter in model.get_parameters() if parameter.name.endswith("experts.w_in")
    )
    np.testing.assert_array_equal(
        experts.asnumpy()[1], whole[experts.name.replace(".experts.", ".experts.2.")]
    )


@pytest.mark.parametrize("name, ranks", [("four", 4), ("two-after-one", 2)])
def test_the_time_line_has_what_the_ledger_counts(folder, name, ranks):
    events = [
        event
        for event in json.loads((folder / name / "timeline.json").read_text())["traceEvents"]
        if event["ph"] == "X"
    ]
    row = next(
        row for row in tiny.rows(folder / name) if row["step"] == runs.WATCHED and "loss" in row
    )
    exchanges = [event for event in events if event["name"] == "exchange"]
    assert {event["tid"] // 2 for event in events} == set(range(ranks))
    # One sparse layer: tokens, their affinity and the outputs; the gradients of two of them.
    assert len(exchanges) == 5 * ranks
    assert (
        sum(event["args"]["bytes"] for event in exchanges)
        == row["intra_node_bytes"] + row["inter_node_bytes"]
        > 0
    )
    for rank in range(ranks):
        own = {event["name"]: event for event in events if event["tid"] // 2 == rank}
        step = own.pop("step")
        assert set(own) == {"exchange", "experts", "reduction"}
        assert all(
            step["ts"] <= event["ts"] and event["ts"] + event["dur"] <= step["ts"] + step["dur"] + 2
            for event in own.values()
        )
