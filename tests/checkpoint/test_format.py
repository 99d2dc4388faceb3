"""Checkpoints: what is in them, and what becomes of broken ones and of full disks."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import tiny

from pangu_locmoe.checkpoint import format as checkpoints
from pangu_locmoe.checkpoint import shards
from pangu_locmoe.cli import main
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.train.loop import Trainer
from pangu_locmoe.train.optimizer import AdamW
from pangu_locmoe.train.run import train


@pytest.fixture(scope="module")
def config():
    return tiny.tiny_config(
        model={"num_layers": 4, "num_moe_layers": 2}, moe={"router": "switch"}, train={"steps": 5}
    )


@pytest.fixture(scope="module")
def model(config):
    return PanguSigma(config)


@pytest.fixture(scope="module")
def tokenizer_file(config):
    return prepare(config, False).path / "tokenizer.json"


@pytest.fixture
def folder(config, model, tokenizer_file, tmp_path):
    """A checkpoint of the model."""
    path = tmp_path / "step-00000001"
    checkpoints.save_checkpoint(path, config, tokenizer_file, model, _adam(model), {"step": 1})
    return path


def _adam(model):
    parameters = list(model.trainable_params())
    return AdamW(parameters, [True] * len(parameters))


def test_experts_are_kept_by_their_global_id(model, folder):
    arrays = load_file(folder / "model.safetensors")
    names = {name for name in arrays if ".experts." in name}
    assert names == {
        f"blocks.{block}.moe.experts.{e}.{w}"
        for block in (1, 2)
        for e in range(4)
        for w in ("w_in", "w_out")
    }
    experts = model.blocks[2].moe.experts
    for expert in range(4):
        np.testing.assert_array_equal(
            arrays[f"blocks.2.moe.experts.{expert}.w_in"], experts.w_in.asnumpy()[expert]
        )
        np.testing.assert_array_equal(
            arrays[f"blocks.2.moe.experts.{expert}.w_out"], experts.w_out.asnumpy()[expert]
        )
    assert "blocks.1.moe.experts.w_in" not in arrays
    moments = load_file(folder / "optimizer.safetensors")
    assert moments["adam_m.blocks.1.moe.experts.3.w_in"].shape == (32, 64)


def test_everything_is_loaded_back(config, model, folder):
    other = PanguSigma(
        config.model_copy(update={"train": config.train.model_copy(update={"seed": 2})})
    )
    assert any(
        (one.asnumpy() != two.asnumpy()).any()
        for one, two in zip(model.get_parameters(), other.get_parameters())
    )
    checkpoints.load_weights(folder, other)
    for one, two in zip(model.get_parameters(), other.get_parameters()):
        np.testing.assert_array_equal(one.asnumpy(), two.asnumpy(), err_msg=one.name)
    assert checkpoints.read_config(folder) == config
    assert checkpoints.read_state(folder)["step"] == 1
    assert (folder / "tokenizer.json").is_file()


def test_the_moments_of_the_experts_are_loaded_back(model, tmp_path, config, tokenizer_file):
    first = _adam(model)
    second = _adam(model)
    for parameter in first.moment_m:
        parameter.set_data(parameter + float(np.random.default_rng(len(parameter.name)).normal()))
    checkpoints.save_checkpoint(tmp_path / "c", config, tokenizer_file, model, first)
    checkpoints.load_optimizer(tmp_path / "c", second, shards.Held.by(model))
    for one, two in zip(first.get_parameters(), second.get_parameters()):
        np.testing.assert_array_equal(one.asnumpy(), two.asnumpy(), err_msg=one.name)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_experts": 2}, r"blocks\.1\.moe\.experts\.2\.w_in has no place"),
        ({"num_experts": 8}, r"it has no blocks\.1\.moe\.experts\.4\.w_in"),
        ({"router": "locmoe"}, r"blocks\.1\.moe\.router\.w_?\w* has no place"),
    ],
)
def test_a_checkpoint_of_another_model_names_the_first_weight(config, folder, change, message):
    other = config.model_copy(update={"moe": config.moe.model_copy(update=change)})
    # The gate comes before the experts in a model and would be named first where its shape depends
    # on their number.
    if "num_experts" in change:
        arrays = {
            name: array
            for name, array in load_file(folder / "model.safetensors").items()
            if ".router." not in name
        }
        model = PanguSigma(other)
        parameters = [
            parameter for parameter in model.get_parameters() if ".router." not in parameter.name
        ]
        with pytest.raises(CheckpointError, match=f"is of another model: .*{message}"):
            shards.set_parameters(parameters, arrays, str(folder), shards.Held.by(model))
    else:
        with pytest.raises(CheckpointError, match=f"is of another model: .*{message}"):
            checkpoints.load_weights(folder, PanguSigma(other))


def test_another_shape_is_named_with_both_shapes(config, folder):
    other = config.model_copy(update={"model": config.model.model_copy(update={"ffn_size": 48})})
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.ffn\.w_in the shape \[32, 64\], not \[32, 48\]"
    ):
        checkpoints.load_weights(folder, PanguSigma(other))


def test_a_truncated_checkpoint_is_named(config, model, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=rf"^{file} is missing or damaged: "):
        checkpoints.load_weights(folder, model)


def test_evaluating_a_truncated_checkpoint_is_one_line(folder, capsys):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert main(["evaluate", str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"pangu-locmoe: {file} is missing or damaged") and "\n" not in error


def test_a_checkpoint_is_replaced_as_a_whole(config, model, folder, tokenizer_file):
    checkpoints.save_checkpoint(folder, config, tokenizer_file, model, None, {"step": 2})
    assert checkpoints.read_state(folder)["step"] == 2
    assert not (folder / "optimizer.safetensors").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("call", range(1, 8))
def test_a_crash_at_any_point_of_a_replacement_leaves_a_whole_one(
    config, model, tokenizer_file, tmp_path, monkeypatch, call
):
    """Every rename and every removal is a point; after it nothing more is done."""
    run_dir = tmp_path / "run"
    path = run_dir / "checkpoints" / "step-00000004"
    checkpoints.save_checkpoint(
        path, config, tokenizer_file, model, _adam(model), {"step": 4, "best": "old"}
    )

    class Crash(BaseException):
        pass

    calls = []

    def crashing(real):
        def function(*arguments, **keywords):
            if len(calls) == call:
                raise Crash
            calls.append(real)
            return real(*arguments, **keywords)

        return function

    for owner, name in (
        (type(path), "rename"),
        (checkpoints.shutil, "rmtree"),
        (type(path), "mkdir"),
    ):
        monkeypatch.setattr(owner, name, crashing(getattr(owner, name)))
    with contextlib.suppress(Crash):
        checkpoints.save_checkpoint(
            path, config, tokenizer_file, model, _adam(model), {"step": 4, "best": "new"}
        )
    monkeypatch.undo()
    found = checkpoints.latest_whole_checkpoint(run_dir)
    assert found is not None and checkpoints.read_state(found)["best"] in ("old", "new")
    assert checkpoints.recover(run_dir) == []
    assert [one.name for one in path.parent.iterdir()] == ["step-00000004"]
    assert checkpoints.latest_whole_checkpoint(run_dir) == path


FOREIGN = (
    "step-best",
    "step-00000001-hf",
    "step-1",
    "step-00000001 (copy)",
    "step-000000012",
    "step-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661",
    "STEP-00000001",
    "best",
    ".step-best",
    ".step-00000002.bak",
    "step-00000001.old",
)


def test_what_is_not_ours_is_neither_counted_nor_taken_nor_touched(folder, tmp_path):
    run_dir = tmp_path / "run"
    folders = run_dir / "checkpoints"
    for step in (1, 2, 10):
        shutil.copytree(folder, folders / f"step-{step:08d}")
    for name in FOREIGN:
        shutil.copytree(folder, folders / name)
    (tmp_path / "elsewhere").mkdir()
    (folders / "step-00000099").symlink_to(folder)
    (folders / "step-00000098").write_text("a file")
    (folders / "step-00000000").symlink_to(tmp_path / "elsewhere")
    before = {path.name for path in folders.iterdir()}
    assert [path.name for path in checkpoints.step_folders(run_dir)] == [
        "step-00000001",
        "step-00000002",
        "step-00000010",
    ]
    assert checkpoints.find_checkpoint(run_dir).name == "step-00000010"
    assert checkpoints.recover(run_dir) == []
    assert checkpoints.remove_old(run_dir, 10, 1, None) == []
    assert {path.name for path in folders.iterdir()} == before - {"step-00000001", "step-00000002"}


def test_a_removal_that_fails_is_a_line(folder, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    for step in (1, 2):
        shutil.copytree(folder, run_dir / "checkpoints" / f"step-{step:08d}")

    def refuse(*arguments, **keywords):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    (line,) = checkpoints.remove_old(run_dir, 2, 1, None)
    assert line == f"{run_dir}/checkpoints/step-00000001 cannot be removed: Permission denied"


def test_a_clean_up_that_fails_is_a_note(tmp_path, monkeypatch, capsys):
    config = tiny.tiny_config(
        moe={"router": "hash"},
        train={"steps": 3, "warmup_steps": 1, "mode": "pynative"},
        checkpoint={"every": 1, "keep": 1},
        evaluation={"every": 3, "sequences": 1},
    )

    def refuse(folder, *arguments, **keywords):
        if folder.name == "step-00000001":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(folder, *arguments, **keywords)

    real = shutil.rmtree
    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    assert train(config, tmp_path / "run", progress=False) is None
    assert (
        capsys.readouterr().out.count("step-00000001 cannot be removed: Permission denied\n") == 1
    )


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "null",
        "3",
        '{"step": null}',
        '{"step": "4"}',
        '{"step": -1}',
        '{"step": 1, "shards": []}',
        '{"step": 1, "shards": {"model": 0}}',
        "\xff",
        '{"step": ',
    ],
)
def test_a_state_that_is_none_is_one_line(folder, capsys, text):
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"^{folder} is not a checkpoint: [^\n]+$"):
        checkpoints.read_state(folder)
    assert main(["evaluate", str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"pangu-locmoe: {folder} is not a checkpoint: ") and "\n" not in error


@pytest.mark.parametrize("where", ["weights", "sync", "rename"])
def test_what_cannot_be_written_leaves_the_old_one(
    config, model, folder, tokenizer_file, monkeypatch, where
):
    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "weights":
        monkeypatch.setattr(shards, "save_file", full)
    elif where == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(type(folder), "rename", full)
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint .*step-00000002 cannot be written: .*No space left on device",
    ) as error:
        checkpoints.save_checkpoint(
            folder.parent / "step-00000002", config, tokenizer_file, model, None, {"step": 2}
        )
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    checkpoints.load_weights(folder, model)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many kilobytes in a folder; skips where that is
    not allowed.
    """
    mounted = []

    def mount(folder, kilobytes):
        folder.mkdir(parents=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_with_one_line(small_disk, tmp_path, capsys):
    run_dir = tmp_path / "run"
    config = tiny.tiny_config(
        moe={"router": "hash"},
        train={"steps": 6},
        checkpoint={"every": 2, "keep": 3},
        evaluation={"every": 6, "sequences": 1},
    )
    # Room for one checkpoint and a half.
    small_disk(run_dir / "checkpoints", 1000)
    assert (
        main(
            ["train", str(tiny.write(config, tmp_path)), "--run-dir", str(run_dir), "--no-progress"]
        )
        == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        f"pangu-locmoe: checkpoint {run_dir}/checkpoints/step-00000004 cannot be written: "
    )
    assert "No space left" in error
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoints.latest_whole_checkpoint(run_dir).name == "step-00000002"
    checkpoints.load_weights(run_dir / "checkpoints" / "step-00000002", PanguSigma(config))


def test_a_full_disk_under_the_metrics_stops_the_run_with_one_line(small_disk, tmp_path, capsys):
    run_dir = tmp_path / "run"
    config = tiny.tiny_config(
        moe={"router": "hash"},
        train={"steps": 200},
        checkpoint={"every": 200},
        evaluation={"every": 200, "sequences": 1},
    )
    small_disk(run_dir, 20)
    assert (
        main(
            ["train", str(tiny.write(config, tmp_path)), "--run-dir", str(run_dir), "--no-progress"]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith(f"pangu-locmoe: {run_dir} cannot be written: ")
    assert "Traceback" not in error


def test_weights_of_another_tokenizer_are_refused(tmp_path):
    config = tiny.tiny_config(moe={"router": "hash"})
    prepared = prepare(config, False)
    other = tmp_path / "tokenizer.json"
    other.write_bytes((prepared.path / "tokenizer.json").read_bytes() + b"\n")
    checkpoints.save_checkpoint(tmp_path / "start", config, other, PanguSigma(config))
    with pytest.raises(
        CheckpointError,
        match=r"start was trained with another tokenizer than this run's; set data\.tokenizer=",
    ):
        Trainer(config, prepared, tmp_path / "run", init_from=tmp_path / "start")
    checkpoints.save_checkpoint(
        tmp_path / "good", config, prepared.path / "tokenizer.json", PanguSigma(config)
    )
    Trainer(config, prepared, tmp_path / "run", init_from=tmp_path / "good")


def test_training_starts_from_given_weights(tmp_path):
    """With steps that change nothing, the run's weights are those it was given."""
    config = tiny.tiny_config(
        moe={"router": "hash"},
        train={"steps": 1, "warmup_steps": 0, "learning_rate": 1e-30, "weight_decay": 0.0},
    )
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 9})})
    start = PanguSigma(other, prepare(config, False).token_counts)
    checkpoints.save_checkpoint(
        tmp_path / "start", other, prepare(config, False).path / "tokenizer.json", start
    )
    train(config, tmp_path / "run", init_from=tmp_path / "start", progress=False)
    arrays = load_file(checkpoints.find_checkpoint(tmp_path / "run") / "model.safetensors")
    for name, array in shards.named_arrays(start.get_parameters(), shards.Held.by(start)).items():
        np.testing.assert_allclose(arrays[name], array, atol=1e-12, err_msg=name)


def test_a_folder_without_a_checkpoint_is_said_to_be_none(tmp_path):
    with pytest.raises(
        CheckpointError, match="is neither a checkpoint nor a run directory with one"
    ):
        checkpoints.find_checkpoint(tmp_path)


def test_the_name_of_the_version_before_is_this_module():
    from pangu_locmoe.train import checkpoint

    assert checkpoint is checkpoints
