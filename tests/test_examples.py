"""scripts/examples: each runs as a user would start it, without data and in a folder of its own,
and does what it says.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import exported

from pangu_locmoe.convert.hf.exporting import export

EXAMPLES = Path(__file__).resolve().parents[1] / "scripts" / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_are_run_here():
    tested = re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8"))
    assert sorted(tested) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_train_evaluate_and_sample_a_given_text(tmp_path):
    for number in range(20):
        text = f"{number}. " + "the router sends a token to its expert. " * 40
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    said = run("train_in_python.py", tmp_path, str(tmp_path / "*.txt"))
    columns = r"^text 0 +([0-9.]+) +[0-9.]+ +([0-9.]+) +([0-9.]+)(?: +\d+){3}$"
    rows = re.findall(columns, said, re.MULTILINE)
    # What the run said last, and what its checkpoint's evaluation says.
    assert len(rows) == 2 and rows[0] == rows[1]
    _, bits, bigram = rows[0]
    assert float(bits) < float(bigram)
    assert re.fullmatch(r"The router .+", said.splitlines()[-1])


@pytest.mark.slow
def test_a_router_of_ones_own_trains_beside_ours(tmp_path):
    said = run("own_router.py", tmp_path)
    found = re.findall(
        r"^(\w+) +validation loss ([0-9.]+), [0-9.]+ bits per byte$", said, re.MULTILINE
    )
    assert [name for name, _ in found] == ["FirstFeatures", "locmoe"]
    assert all(float(loss) < 5.9 for _, loss in found)  # ln 400 = 6.0


@pytest.mark.parametrize("given", [False, True])
def test_a_trace_becomes_a_plan(tmp_path, given):
    arguments = []
    if given:
        draw = np.random.default_rng(0)
        source = draw.multinomial(1000, [0.4, 0.3, 0.2, 0.1], size=(120, 1, 2))
        np.savez(tmp_path / "load.npz", step=np.arange(120), load=source.sum(axis=2), source=source)
        arguments = [str(tmp_path), str(tmp_path / "mine.json")]
    said = run("trace_and_place.py", tmp_path, *arguments)
    assert re.search(r"^stable from step \d+ of", said)
    assert re.search(r"^moves \d+ experts", said, re.MULTILINE)
    plan = json.loads(Path(said.splitlines()[-1]).read_text(encoding="utf-8"))
    assert plan["after"]["step_seconds"] <= plan["now"]["step_seconds"]
    assert plan["ranks_per_node"] == 2


@pytest.mark.parametrize("arguments", [(), ("sglang",)])
def test_a_serving_trace_becomes_a_placement_of_the_engine(tmp_path, arguments):
    if arguments:
        load = np.random.default_rng(0).integers(1, 100, (2, 12)).tolist()
        snapshots = [{"step": 5, "window_expert_load": load}]
        content = {"physical_to_logical_map": [[*range(12)]] * 2, "snapshots": snapshots}
        (tmp_path / "dump.json").write_text(json.dumps(content), encoding="utf-8")
        arguments = ("dump.json", "location.json", *arguments)
    said = run("serving_trace.py", tmp_path, *arguments)
    found = re.search(r"^max/mean load of a rank: ([0-9.]+), then ([0-9.]+)$", said, re.MULTILINE)
    assert found and float(found[1]) > float(found[2]) >= 1
    written = json.loads((tmp_path / said.splitlines()[-1]).read_text(encoding="utf-8"))
    if arguments:
        assert [len(slots) for slots in written["physical_to_logical_map"]] == [16, 16]
    else:
        devices = written["layer_list"][1]["device_list"]
        assert [len(device["device_expert"]) for device in devices] == [3] * 4


def test_an_exported_model_is_evaluated_in_transformers(tmp_path):
    """To the bits per byte that it has here."""
    pytest.importorskip("transformers", reason="needs pip install '.[export]'")
    folder = exported.checkpoint("hash")
    export(folder, tmp_path / "model")
    text = "the router sends every token"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    said = run("evaluate_in_transformers.py", tmp_path, "model", "text.txt").splitlines()
    ids = exported.prepared().tokenizer.encode(text)
    logits_SV = exported.logits("hash", np.array([[0, *ids[:-1]]], np.int32), np.zeros(1))[0]
    losses_S = np.log(np.exp(logits_SV).sum(1)) - logits_SV[np.arange(len(ids)), ids]
    bits = float(losses_S.sum() / np.log(2) / len(text))
    assert said[0] == f"{bits:.4f} bits per byte: text.txt"
    assert said[1].startswith("The router ")
