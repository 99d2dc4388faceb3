"""Runs and checkpoints of versions that had no final norm and no floor of the capacity."""

from __future__ import annotations

import shutil

import pytest
import yaml
from support import tiny

from pangu_locmoe.checkpoint.format import (
    find_checkpoint,
    read_arrays,
    read_config,
    save_checkpoint,
)
from pangu_locmoe.checkpoint.restore import restore_generator, restore_model
from pangu_locmoe.config import load_config, parse_config
from pangu_locmoe.config.stored import as_before, load_stored_config
from pangu_locmoe.convert.extract import extract
from pangu_locmoe.convert.inherit import inherit
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.report.page import build_report
from pangu_locmoe.train.evaluate import evaluate_checkpoint
from pangu_locmoe.train.run import train

SHORT = {
    "train": {"steps": 4, "mode": "pynative"},
    "evaluation": {"every": 4, "sequences": 2},
    "checkpoint": {"every": 2, "keep": 4},
}


def old_file(file):
    """Take out of a stored configuration what older versions did not write."""
    values = yaml.safe_load(file.read_text())
    del values["model"]["final_norm"], values["moe"]["capacity"]["max_drop"]
    file.write_text(yaml.safe_dump(values))


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """A run of two levels without a final norm, as an older version left it."""
    run_dir = tmp_path_factory.mktemp("old") / "run"
    model = {"final_norm": False}
    assert (
        train(
            tiny.tiny_config(
                model=model, moe={"levels": 2, "num_experts": 6, "router": "switch"}, **SHORT
            ),
            run_dir,
            progress=False,
        )
        is None
    )
    for file in (run_dir / "config.yaml", *run_dir.glob("checkpoints/*/config.yaml")):
        old_file(file)
    return run_dir


def config_of(**sections):
    return tiny.tiny_config(
        **{"moe": {"levels": 2, "num_experts": 6, "router": "switch"}, **SHORT, **sections}
    )


def test_absent_keys_say_what_was_done(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("moe: {capacity: {policy: bound}}\n")
    stored = load_stored_config(file)
    current = load_config(file)
    assert (stored.model.final_norm, stored.moe.capacity.max_drop) == (False, 1.0)
    assert (current.model.final_norm, current.moe.capacity.max_drop) == (True, None)
    taken = as_before(current, stored)
    assert taken == (stored, ("model.final_norm", "moe.capacity.max_drop"))
    assert as_before(current, stored, "model")[1] == ("model.final_norm",)
    asked = parse_config({"model": {"final_norm": True}})
    assert as_before(asked, stored)[0].model.final_norm
    # What is written now is read as it is.
    file.write_text(current.to_yaml())
    assert load_stored_config(file) == current
    file.write_text("moe: {router: hash}\n")
    assert load_stored_config(file).moe.capacity.max_drop is None
    file.write_text("moe: 3\n")
    with pytest.raises(ConfigError, match="moe = 3"):
        load_stored_config(file)


def test_an_old_run_goes_on_with_its_old_yaml(old_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(old_run, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    with pytest.raises(ConfigError, match=r"model\.final_norm = True: the run in .* has False"):
        train(config_of(model={"final_norm": True}), run_dir, resume=True, progress=False)
    assert train(config_of(), run_dir, resume=True, progress=False) is None
    assert tiny.rows(run_dir) == tiny.rows(old_run)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["final_norm"] is False
    assert (
        train(config_of(), run_dir, resume=True, progress=False) is None
    )  # also now that its file has the key


def test_old_checkpoints_are_read_by_every_verb(old_run, tmp_path):
    folder = find_checkpoint(old_run)
    assert not any("final_norm" in name for name in read_arrays(folder / "model.safetensors"))
    assert (
        evaluate_checkpoint(old_run, 2)["validation_loss"]
        == tiny.rows(old_run)[-1]["validation_loss"]
    )
    assert (
        restore_model(folder)[0].has_final_norm is False and restore_generator(old_run) is not None
    )
    extract(old_run, "zh", tmp_path / "zh")
    assert (
        yaml.safe_load((tmp_path / "zh" / "config.yaml").read_text())["model"]["final_norm"]
        is False
    )
    assert build_report([old_run], tmp_path / "report.html").is_file()
    assert train(config_of(), tmp_path / "from", init_from=old_run, progress=False) is None
    assert read_config(find_checkpoint(tmp_path / "from")).model.final_norm is False


def test_an_old_dense_checkpoint_is_inherited(tmp_path):
    dense = tiny.tiny_config(model={"num_moe_layers": 0, "final_norm": False})
    save_checkpoint(
        tmp_path / "dense", dense, prepare(dense, False).path / "tokenizer.json", PanguSigma(dense)
    )
    old_file(tmp_path / "dense" / "config.yaml")
    assert inherit(
        tmp_path / "dense", tiny.tiny_config(moe={"router": "hash"}), tmp_path / "sparse"
    ).endswith("; model.final_norm as there")
    assert read_config(tmp_path / "sparse").model.final_norm is False
