"""Experts that are elsewhere at first, or move while a job trains: the same losses, fewer bytes
between nodes, and a kill on the way loses nothing.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import jobs, tiny

from pangu_locmoe.checkpoint.format import latest_whole_checkpoint, read_state

pytestmark = pytest.mark.alone

WORKER = Path(jobs.__file__).with_name("placement_worker.py")
STEPS = 22
EVERY = 10
START = [[5, 3, 1, 0, 2, 4], [0, 1, 2, 3, 4, 5]]  # for test_experts_begin_where_they_are_put


def config(policy: str, steps: int = STEPS, start: Any = None) -> Any:
    """Each domain's tokens go to its own experts, but text is dealt to nodes by content: the
    experts may be elsewhere.
    """
    return tiny.tiny_config(
        model={"num_layers": 4, "num_moe_layers": 2},
        moe={"router": "switch", "levels": 2, "num_experts": 6, "capacity": {"factor": 1.25}},
        data={"sharding": "content"},
        train={
            "steps": steps,
            "schedule": "constant",
            "learning_rate": 5e-4,
            "epsilon": 1e-6,
            "mode": "pynative",
        },
        evaluation={"every": steps, "sequences": 2},
        checkpoint={"every": 5, "keep": 9},
        parallel={"expert_parallel": 2, "nodes": 2},
        placement={
            "policy": policy,
            "start": start,
            "every": EVERY,
            "min_gain": 0.01,
            "while_transient": True,
            "flops_per_second": 1e9,
            "link_bytes_per_second": 1e7,
        },
    )


@functools.cache
def runs() -> Path:
    """The run directories still, moved and started."""
    folder = Path(tempfile.mkdtemp(prefix="placement-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    arguments = []
    for name, settings in (
        ("still", ("off",)),
        ("moved", ("locality",)),
        ("started", ("off", 6, START)),
    ):
        arguments += [tiny.write(config(*settings), folder, name), folder / name]
    done = jobs.msrun(2, folder, WORKER, "train", *arguments, timeout=300)
    assert done.returncode == 0, jobs.logs(folder)
    return folder


def rows(run_dir: Path, key: str) -> np.ndarray:
    return np.array([row[key] for row in tiny.rows(run_dir) if "loss" in row])


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in tiny.rows(run_dir) if row.get("event") == "placement"]


@pytest.mark.parametrize("name", ["moved", "started"])
@pytest.mark.slow
def test_the_losses_are_those_of_a_run_without_moves(name):
    still = runs() / "still"
    moved = runs() / name
    for key in ("loss", "cross_entropy", "grad_norm", "max_over_mean_load", "dropped_fraction"):
        found = rows(moved, key)
        np.testing.assert_allclose(
            found, rows(still, key)[: len(found)], rtol=0, atol=1e-6, err_msg=key
        )
    with np.load(still / "load.npz") as one, np.load(moved / "load.npz") as other:
        np.testing.assert_array_equal(one["source"][: len(found)], other["source"])


def test_experts_have_moved_to_their_tokens():
    still = runs() / "still"
    moved = runs() / "moved"
    assert [row["step"] for row in events(moved)] == [EVERY, 2 * EVERY] and not events(still)
    first = events(moved)[0]
    assert first["experts_moved"] > 0 and first["bytes_moved"] > 0 and first["gain"] > 0.01
    for key, better in (("inter_node_bytes", np.less), ("local_fraction", np.greater)):
        np.testing.assert_array_equal(rows(moved, key)[:EVERY], rows(still, key)[:EVERY])
        assert better(rows(moved, key)[EVERY:].mean(), rows(still, key)[EVERY:].mean()), key
    state = read_state(latest_whole_checkpoint(moved))
    for slots in state["slot_to_expert"]:
        assert sorted(slots) == list(range(6))
    assert any(slots != list(range(6)) for slots in state["slot_to_expert"])


def test_experts_begin_where_they_are_put():
    """From the first step on tokens go there; and the checkpoint says where."""
    still = runs() / "still"
    started = runs() / "started"
    assert (
        not events(started)
        and read_state(latest_whole_checkpoint(started))["slot_to_expert"] == START
    )
    with np.load(started / "load.npz") as trace:
        source_LNE = trace["source"][0]
    holder_LE = np.argsort(START, axis=1) // 3
    away = sum(
        source_LNE[layer, node, holder_LE[layer] != node].sum()
        for layer in range(2)
        for node in range(2)
    )
    assert (
        rows(started, "inter_node_bytes")[0]
        == away * (4 * 32 * 4 + 4)
        != rows(still, "inter_node_bytes")[0]
    )


def test_the_ledger_sees_where_experts_are():
    """Tokens, outputs and both gradients cross for every token whose expert is on the other
    node; the affinity once.
    """
    with np.load(runs() / "moved" / "load.npz") as trace:
        source_WLNE = trace["source"]
    state = read_state(runs() / "moved" / "checkpoints" / f"step-{STEPS:08d}")
    holder_LE = np.argsort(state["slot_to_expert"], axis=1) // 3
    away = sum(
        source_WLNE[-1, layer, node, holder_LE[layer] != node].sum()
        for layer in range(2)
        for node in range(2)
    )
    assert rows(runs() / "moved", "inter_node_bytes")[-1] == away * (4 * 32 * 4 + 4)


@pytest.mark.slow
def test_a_kill_while_experts_move_loses_nothing(tmp_path):
    run_dir = tmp_path / "run"
    file = tiny.write(config("locality"), tmp_path)
    assert jobs.msrun(2, tmp_path, WORKER, "kill", file, run_dir, timeout=300).returncode != 0
    assert latest_whole_checkpoint(run_dir).name == "step-00000005"
    assert jobs.msrun(2, tmp_path, WORKER, "train", file, run_dir, timeout=300).returncode == 0, (
        jobs.logs(tmp_path)
    )
    for key in ("loss", "grad_norm", "inter_node_bytes"):
        np.testing.assert_array_equal(rows(run_dir, key), rows(runs() / "moved", key))
    # And once more from where experts have moved already.
    for folder in (run_dir / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > 15:
            shutil.rmtree(folder)
    assert jobs.msrun(2, tmp_path, WORKER, "train", file, run_dir, timeout=300).returncode == 0, (
        jobs.logs(tmp_path)
    )
    np.testing.assert_array_equal(rows(run_dir, "loss"), rows(runs() / "moved", "loss"))
    assert json.dumps(events(run_dir)[0]["experts_moved"]) == json.dumps(
        events(runs() / "moved")[0]["experts_moved"]
    )
