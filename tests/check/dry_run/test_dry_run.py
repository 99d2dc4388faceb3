"""Dry runs themselves: the shipped configurations and every kind of step, by MindSpore's Ascend back
end.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import ascend_memory
import pytest

from pangu_locmoe.check.check import shallower
from pangu_locmoe.check.dry_run.libraries import DEFAULT_CHIP, TOOLS, plugin_files, ready
from pangu_locmoe.check.dry_run.run import DryRun, comparable, dry_run
from pangu_locmoe.config import load_config, parse_config
from pangu_locmoe.errors import DryRunError

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs" / "ascend"


def reason() -> str:
    """Why there is no dry run here; empty: there is one."""
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    import importlib.util

    spec = importlib.util.find_spec("mindspore")
    try:
        plugin_files(Path(spec.origin).parent)
    except DryRunError as error:
        return str(error)
    return ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason()), reason=reason() or "dry runs work here"),
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("cache"))


def values(router="locmoe", parallel=None, train=None):
    """Two sparse and one dense block on 8 ranks in 2 nodes."""
    return {
        "model": {
            "vocab_size": 304,
            "hidden_size": 64,
            "num_layers": 4,
            "num_moe_layers": 2,
            "num_heads": 4,
            "ffn_size": 64,
            "seq_length": 32,
        },
        "moe": {
            "router": router,
            "num_experts": 8,
            "levels": 1,
            "capacity": {"local_factor": 2.0, "remote_factor": 2.0},
        },
        "parallel": {"expert_parallel": 8, "nodes": 2, "sizes": "static", **(parallel or {})},
        "train": {"batch_size": 16, "precision": "bf16", **(train or {})},
    }


TENSOR = {"tensor_parallel": 2, "expert_parallel": 4}
KINDS = {
    "bf16": values(),
    "fp32": values(train={"precision": "fp32"}),
    "fp16": values(train={"precision": "fp16"}),
    "fused and recomputed": values(train={"fused": True, "recompute": True}),
    "accumulation": values(train={"accumulation_steps": 2}),
    "offload": values(train={"offload_expert_optimizer": True}),
    "chunks": values(parallel={"overlap_chunks": 2}),
    "sharded": values(parallel={"shard_optimizer": True}),
    "groupwise": values(parallel={**TENSOR, "exchange": "groupwise"}),
    "sequence parallel": values(parallel={**TENSOR, "sequence_parallel": True}),
    "hash": values("hash"),
    "switch": values("switch"),
    "locmoe_plus": values("locmoe_plus"),
}


def run(libraries, given, *ranks: int) -> DryRun:
    return dry_run(parse_config(given), 8, ranks or (0,), libraries, DEFAULT_CHIP)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step_has_its_kernels(libraries, kind):
    result = run(libraries, KINDS[kind])
    assert result.problems == []
    (rank,) = result.runs
    assert {"aclnn", "hccl"} <= set(rank.kernels) and rank.launches > 500
    exchanges = [each for each in rank.communication if each.operator == "AlltoAllV"]
    chunks = 2 if kind == "chunks" else 1
    assert [each.direction for each in exchanges].count("forward") == 4 * chunks
    assert [each.direction for each in exchanges].count("backward") == 4 * chunks
    assert comparable(result.estimates[0]) > 0 and rank.peak_bytes > 0


def test_chunks_overlap(libraries):
    """Forward, the exchange of the second chunk is under the experts of the first, and the first
    one's way back under those of the second: two products each. There is nothing before the first
    and after the last.
    """
    (rank,) = run(libraries, KINDS["chunks"]).runs
    products = [
        each.products
        for each in rank.communication
        if each.operator == "AlltoAllV" and each.direction == "forward"
    ]
    assert products == [0, 2, 2, 0] * 2


def test_ranks_of_different_groups_meet(libraries):
    """Ranks of a tensor-parallel group, of an expert-parallel group, and of neither."""
    given = values(parallel={**TENSOR, "exchange": "groupwise", "shard_optimizer": True})
    result = run(libraries, given, 0, 1, 6)
    assert result.problems == []
    assert "ranks 0, 1, 6 take the collectives that they share in the same order" in result.format()


@pytest.mark.parametrize(
    "name, ranks, last",
    [
        ("small", 8, 7),
        ("paper_38b_64", 64, 63),
        ("paper_38b", 128, 127),
        ("paper_38b_910a", 128, 127),
        ("paper_38b_256", 256, 255),
        ("pangu_sigma", 1024, 1023),
    ],
)
def test_shipped_configurations(libraries, name, ranks, last):
    config = shallower(load_config(CONFIGS / f"{name}.yaml"))
    result = dry_run(config, ranks, (0, last), libraries, DEFAULT_CHIP)
    assert result.problems == []


@pytest.mark.parametrize("name", ["bf16", "recompute", "paper_38b"])
def test_memory_is_as_estimated(libraries, name):
    """Never below what MindSpore plans, and at most 15% above; docs/ascend.md has the table."""
    job = ascend_memory.JOBS[name]
    result = dry_run(job.config(), job.ranks, (0,), libraries, DEFAULT_CHIP)
    planned = result.runs[0].peak_bytes
    assert planned <= comparable(result.estimates[0]) <= ascend_memory.MOST * planned
