"""The compiled step of an Ascend job, run by CPU processes with stand-ins for HCCL's operators,
is the ordinary step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import graph_job, jobs

pytestmark = pytest.mark.alone

EVERYDAY = [(2, "expert parallel")]
SLOW = [(2, "sharded, half precision"), *[(4, name) for name in graph_job.CASES]]


def run(folder: Path, ranks: int, name: str) -> list[dict[str, Any]]:
    """What every rank found."""
    # Ranks that compile on few cores are silent for longer than the seconds after which other tests
    # want a rank to be dead.
    done = jobs.msrun(
        ranks,
        folder,
        Path(graph_job.__file__),
        folder,
        name,
        timeout=300,
        env=jobs.environment(MS_NODE_TIMEOUT="120"),
    )
    assert done.returncode == 0, jobs.logs(folder)
    return [
        json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
        for rank in range(ranks)
    ]


def assert_the_same(name: str, found: list[dict[str, Any]]) -> None:
    half = graph_job.CASES[name].train.get("precision") == "fp16"
    for rank in found:
        assert rank["compiled"] == found[0]["compiled"], "the ranks report different things"
        assert len(rank["compiled"]) == graph_job.STEPS
        for compiled, ordinary in zip(rank["compiled"], rank["ordinary"]):
            np.testing.assert_allclose(
                compiled["losses"], ordinary["losses"], rtol=0, atol=5e-3 if half else 1e-5
            )
            for key in (
                "skipped",
                "loss_scale",
                "traffic",
                *(() if half else ("load", "dropped", "norm")),
            ):
                assert compiled[key] == (
                    pytest.approx(ordinary[key], rel=1e-4) if key == "norm" else ordinary[key]
                ), key
    rows = found[0]["compiled"]
    # The loss scale begins so high, or doubles so soon, that fp16 overflows on the way.
    assert any(row["skipped"] for row in rows) == half and not rows[-1]["skipped"]
    assert sum(np.sum(row["dropped"]) for row in rows) > 0 and rows[0]["traffic"] != [0] * 4


@pytest.mark.parametrize("ranks, name", EVERYDAY)
def test_the_compiled_step_is_the_ordinary_one(tmp_path, ranks, name):
    assert_the_same(name, run(tmp_path, ranks, name))


@pytest.mark.slow
@pytest.mark.parametrize("ranks, name", SLOW)
def test_and_in_every_other_layout(tmp_path, ranks, name):
    assert_the_same(name, run(tmp_path, ranks, name))
