"""The compiled step of an Ascend job, run by CPU processes with stand-ins for HCCL's operators, is the ordinary step."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster import graph_job
from distributed import jobs

pytestmark = pytest.mark.alone

EVERYDAY = {2: ["expert parallel", "sharded, half precision"]}
SLOW = {4: [name for name in graph_job.CASES if name not in EVERYDAY[2]]}
SCRIPT = Path(graph_job.__file__)


@functools.cache
def job(ranks: int) -> list[dict[str, Any]]:
    """What every rank found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done = jobs.msrun(ranks, folder, SCRIPT, folder, *{**EVERYDAY, **SLOW}[ranks], timeout=900)
        assert done.returncode == 0, jobs.logs(folder)
        return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def cases(table: dict[int, list[str]]) -> list[Any]:
    return [(ranks, name) for ranks, names in table.items() for name in names]


def assert_the_same(ranks: int, name: str) -> None:
    case, found = graph_job.CASES[name], job(ranks)
    half = case.train.get("precision") == "fp16"
    for rank in found:
        assert rank[name]["compiled"] == found[0][name]["compiled"], "the ranks report different things"
        assert len(rank[name]["compiled"]) == graph_job.STEPS
        for compiled, ordinary in zip(rank[name]["compiled"], rank[name]["ordinary"]):
            np.testing.assert_allclose(compiled["losses"], ordinary["losses"], rtol=0, atol=5e-3 if half else 1e-5)
            for key in ("skipped", "loss_scale", "traffic", *(() if half else ("load", "dropped", "norm"))):
                assert compiled[key] == (pytest.approx(ordinary[key], rel=1e-4) if key == "norm" else ordinary[key]), key
    rows = found[0][name]["compiled"]
    # The loss scale begins so high that fp16 overflows at first.
    assert rows[0]["skipped"] == half and not rows[-1]["skipped"]
    assert sum(np.sum(row["dropped"]) for row in rows) > 0 and rows[0]["traffic"] != [0, 0]


@pytest.mark.parametrize("ranks, name", cases(EVERYDAY))
def test_the_compiled_step_is_the_ordinary_one(ranks, name):
    assert_the_same(ranks, name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, name", cases(SLOW))
def test_and_in_every_other_layout(ranks, name):
    assert_the_same(ranks, name)
