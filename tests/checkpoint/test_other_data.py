"""A checkpoint knows the text and the tokenizer it was trained with, and which checkpoint is
used is said.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import tiny

from pangu_locmoe.checkpoint.format import read_identity, read_state
from pangu_locmoe.checkpoint.restore import restore_generator
from pangu_locmoe.cli import main
from pangu_locmoe.config import Config
from pangu_locmoe.errors import CheckpointError, ConfigError
from pangu_locmoe.report.page import build_report
from pangu_locmoe.train.evaluate import evaluate_checkpoint
from pangu_locmoe.train.run import train


def config_of(folder: Path, steps: int = 4) -> Config:
    """A model too small to compile, on a corpus of its own in `folder`."""
    return tiny.tiny_config(
        model={"num_layers": 2, "num_moe_layers": 0},
        data={
            "sources": [
                {"path": str(folder / "corpus" / name), "domain": name} for name in ("en", "zh")
            ],
            "prepared_dir": str(folder / "prepared"),
        },
        train={"steps": steps, "mode": "pynative", "batch_size": 4},
        evaluation={"every": 4, "sequences": 8},
        checkpoint={"every": 2, "keep": 9},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(
        tiny.corpus(),
        folder / "corpus",
        ignore=shutil.ignore_patterns("prepared", "reference", "short"),
    )
    train(config_of(folder), folder / "run", progress=False)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy of the corpus and of the run."""
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


def run_of(home: Path) -> Path:
    """The run, with its configuration's paths moved along."""
    for file in (home / "run").rglob("config.yaml"):
        file.write_text(config_of(home).to_yaml(), encoding="utf-8")
    return home / "run"


def stopped(home: Path) -> Path:
    """The run as if it was killed after step 2."""
    shutil.rmtree(home / "run" / "checkpoints" / "step-00000004")
    return run_of(home)


def change_text(home: Path) -> None:
    for file in (home / "corpus" / "en").iterdir():
        file.write_text(
            file.read_text(encoding="utf-8").replace("router", "hunter"), encoding="utf-8"
        )


def forget_identity(run: Path) -> None:
    """As an older version wrote it."""
    for file in run.glob("checkpoints/*/state.json"):
        state = json.loads(file.read_text(encoding="utf-8"))
        del state["identity"]
        file.write_text(json.dumps(state), encoding="utf-8")


def test_resuming_with_other_text_is_refused_and_changes_nothing(home):
    run = stopped(home)
    change_text(home)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    wanted = r"step-00000002 was trained on other data .*: the tokenizer, the training text of en, the validation text of en changed; "
    with pytest.raises(CheckpointError, match=wanted):
        train(config_of(home), run, resume=True, progress=False)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_resuming_with_the_same_text_elsewhere_is_the_same_run(home, made, capsys):
    run = stopped(home)
    (home / "corpus").rename(home / "elsewhere")
    moved = config_of(home)
    sources = [
        source.model_copy(update={"path": source.path.replace("corpus", "elsewhere")})
        for source in moved.data.sources
    ]
    data = moved.data.model_copy(
        update={"sources": sources, "prepared_dir": str(home / "prepared-again")}
    )
    train(moved.model_copy(update={"data": data}), run, resume=True, progress=False)
    assert "resuming after step 2" in capsys.readouterr().out
    assert tiny.rows(run) == tiny.rows(made / "run")


def test_a_checkpoint_that_does_not_know_its_text_goes_on_with_a_note(home, capsys):
    run = stopped(home)
    forget_identity(run)
    moved = config_of(home)
    data = moved.data.model_copy(update={"sources": moved.data.sources[::-1]})
    with pytest.raises(
        ConfigError, match=r"^data\.sources = "
    ):  # nothing else tells whether it is the same text
        train(moved.model_copy(update={"data": data}), run, resume=True, progress=False)
    train(config_of(home), run, resume=True, progress=False)
    assert "note: " in capsys.readouterr().out
    assert read_identity(run / "checkpoints" / "step-00000004") is not None


def test_evaluating_says_which_checkpoint_on_what(home, capsys):
    run = run_of(home)
    newest = run / "checkpoints" / "step-00000004"
    row = evaluate_checkpoint(run)
    assert (row["checkpoint"], row["step"], row["notes"], row["other_data"]) == (
        str(newest),
        4,
        [],
        [],
    )
    final = json.loads((run / "summary.json").read_text(encoding="utf-8"))["final"]
    assert (
        row["validation_loss"] == pytest.approx(final["validation_loss"], rel=1e-6)
        and row["measured_on"] == final["measured_on"]
    )
    low, high = row["validation_loss_interval"]
    assert low < row["validation_loss"] < high
    assert main(["evaluate", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"checkpoint {newest}, step 4"
    assert lines[-2] == f"loss of other documents of this kind: {low:.3f} to {high:.3f} (95%)"


def test_evaluating_on_other_text_says_so(home):
    run = run_of(home)
    change_text(home)
    row = evaluate_checkpoint(run)
    assert row["other_data"] == ["the training text of en", "the validation text of en"]
    assert row["notes"] == [
        (
            "not the data the checkpoint was trained on: the training text of en, the "
            "validation text of en changed"
        )
    ]
    forget_identity(run)
    row = evaluate_checkpoint(run)
    assert row["other_data"] is None and "does not say" in row["notes"][0]


def test_weights_are_enough_to_evaluate_and_to_generate(home, capsys):
    run = run_of(home)
    wanted = evaluate_checkpoint(run)
    optimizer = run / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-5])
    assert evaluate_checkpoint(run) == wanted
    for file in run.glob("checkpoints/*/optimizer.safetensors"):
        file.unlink()
    assert evaluate_checkpoint(run) == wanted
    capsys.readouterr()
    assert main(["generate", str(run), "--tokens", "2"]) == 0
    assert capsys.readouterr().err == f"checkpoint {optimizer.parent}, step 4\n"
    with pytest.raises(CheckpointError, match="no older checkpoint is whole"):
        train(config_of(home), run, resume=True, progress=False)


def test_falling_back_to_older_weights_is_said(home, capsys):
    run = run_of(home)
    weights = run / "checkpoints" / "step-00000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    row = evaluate_checkpoint(run)
    assert row["step"] == 2 and row["notes"][0].startswith(
        f"step-00000004 is passed over: {weights} "
    )
    train(config_of(home), run, resume=True, progress=False)
    assert f"note: step-00000004 is passed over: {weights} " in capsys.readouterr().out
    for file in run.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"")
    (run / "checkpoints" / "step-00000002" / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"^[^\n]*step-00000004/model.safetensors [^\n]*$"):
        evaluate_checkpoint(run)


def test_an_exchanged_tokenizer_is_refused(home):
    run = run_of(home)
    file = run / "checkpoints" / "step-00000004" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    for use in (evaluate_checkpoint, restore_generator):
        with pytest.raises(
            CheckpointError,
            match=r"tokenizer\.json is not the tokenizer the checkpoint was trained with",
        ):
            use(run)


def test_a_report_of_runs_on_other_data_says_so(home, made):
    run = run_of(home)
    page = build_report([made / "run", run], home / "report.html").read_text(encoding="utf-8")
    assert "other data than" not in page and "does not say what data" not in page
    final = json.loads((run / "summary.json").read_text(encoding="utf-8"))["final"]
    assert f"<td>{sum(on['documents'] for on in final['measured_on'].values())}, " in page
    identity = read_state(run / "checkpoints" / "step-00000004")["identity"]
    identity["text"]["zh"]["validation"] = "0" * 32
    (run / "data.json").write_text(json.dumps(identity), encoding="utf-8")
    page = build_report([made / "run", run], home / "report.html").read_text(encoding="utf-8")
    assert "their losses cannot be compared: the validation text of zh differ" in page
    (run / "data.json").write_text("[]", encoding="utf-8")
    assert "does not say what data it was trained on" in build_report(
        [made / "run", run], home / "report.html"
    ).read_text(encoding="utf-8")
