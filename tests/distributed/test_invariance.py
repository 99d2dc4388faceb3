"""The number of processes changes nothing: the same batches give the same losses, counts and
gradients as one process.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from support import cases, runs

pytestmark = pytest.mark.alone

EVERYDAY = [(ranks, name) for ranks, names in cases.EVERYDAY.items() for name in names]
ALL = [(ranks, name) for ranks in (2, 3, 4) for name in cases.possible(ranks)]
PAIRS = [(4, "locmoe, nodes")]


def single(name: str, steps: int) -> list[dict[str, Any]]:
    """The rows of one process; cases that differ only in how a job does them share it."""
    alone = replace(
        cases.CASES[name],
        exchange="flat",
        expert_parallel=None,
        tensor=1,
        shard=False,
        rows=False,
        moves=False,
        static=False,
    )
    return _alone(json.dumps(asdict(alone))).rows(steps)


@functools.cache
def _alone(case: str) -> cases.Run:
    return cases.Run(cases.Case(**json.loads(case)))


def losses(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([row["losses"] for row in rows])


def assert_same_as_one_process(found: list[dict[str, Any]], name: str, steps: int) -> None:
    rows = found[0][name]["rows"]
    wanted = single(name, steps)
    half = cases.CASES[name].train.get("precision") == "fp16"
    assert len(rows) == len(wanted) == steps
    difference = np.abs(losses(rows) - losses(wanted)).max()
    assert difference <= (5e-3 if half else 1e-5), f"losses differ by {difference}"
    for row, one in zip(rows, wanted):
        assert row["skipped"] is False
        if one["bias"] is not None:
            np.testing.assert_allclose(row["bias"], one["bias"], atol=1e-6)
        if not half:
            np.testing.assert_array_equal(row["load"], one["load"])
            np.testing.assert_array_equal(row["dropped"], one["dropped"])
            assert row["unrouted"] == (
                None if one["unrouted"] is None else pytest.approx(one["unrouted"], abs=1e-6)
            )
    for rank in found:
        assert rank[name]["digest"] == found[0][name]["digest"], "the ranks' dense weights differ"
        assert rank[name]["rows"] == found[0][name]["rows"], "the ranks report different things"


@pytest.mark.parametrize("ranks, name", EVERYDAY)
def test_losses_do_not_depend_on_the_number_of_processes(ranks, name):
    assert_same_as_one_process(runs.job(ranks)[1], name, cases.EVERYDAY[ranks][name])


@pytest.mark.slow
@pytest.mark.parametrize("ranks, name", ALL)
def test_nor_in_any_other_case_nor_later(ranks, name):
    assert_same_as_one_process(runs.job(ranks, "all")[1], name, cases.CASES[name].steps)


@pytest.mark.parametrize("ranks, name", EVERYDAY)
def test_the_cases_test_something(ranks, name):
    """The loss falls, tokens are dropped where they should be, and idle experts are idle."""
    steps = cases.EVERYDAY[ranks][name]
    case = cases.CASES[name]
    rows = single(name, steps)
    dropped = sum(np.sum(row["dropped"]) for row in rows)
    assert (dropped == 0) == (
        case.moe["capacity"]["policy"] == "dropless" if "policy" in case.moe["capacity"] else False
    )
    loads = np.array([row["load"] for row in rows])
    tokens = steps * cases.BATCH * cases.LENGTH * case.model.get("num_moe_layers", 1)
    tokens *= case.moe.get("top_k", 1)
    if case.moe.get("router") == "locmoe_plus":
        assert 1.2 * tokens < loads.sum() < 2.8 * tokens and all(
            row["unrouted"] > 0 for row in rows
        )
    else:
        assert loads.sum() == tokens
    assert (loads[..., 1:].sum() == 0) == case.idle
    if steps == cases.STEPS:
        assert rows[-1]["losses"][1] < rows[0]["losses"][1] - 0.02


@pytest.mark.parametrize("ranks, name", PAIRS)
def test_hierarchical_is_bitwise_flat_with_fewer_messages_between_nodes(ranks, name):
    found = runs.job(ranks)[1][0]
    hierarchical = found[f"{name}, hierarchical"]["rows"]
    nodes = cases.CASES[name].nodes
    flat = found[name]["rows"][: len(hierarchical)]
    np.testing.assert_array_equal(losses(hierarchical), losses(flat))
    for one, other in zip(flat, hierarchical):
        assert other["inter_node_bytes"] == one["inter_node_bytes"] > 0
        # Tokens there, their affinity there, outputs back, and the gradients of both: five
        # exchanges.
        assert other["inter_node_messages"] == 5 * nodes * (nodes - 1)
        assert ranks == nodes or other["inter_node_messages"] < one["inter_node_messages"]


def test_groupwise_is_flat_with_half_the_bytes_between_nodes():
    """Two ranks to a replica: each carries half of what both have."""
    found = runs.job(4)[1][0]
    flat = found["tensor and expert parallel"]
    groupwise = found["tensor and expert parallel, groupwise"]
    np.testing.assert_array_equal(losses(groupwise["rows"]), losses(flat["rows"]))
    assert groupwise["digest"] == flat["digest"]
    for one, other in zip(flat["rows"], groupwise["rows"]):
        assert one["inter_node_bytes"] == 2 * other["inter_node_bytes"] > 0


def test_reducing_by_node_sends_the_gradients_between_two_nodes_once():
    """A ring over four ranks sends them one and a half times, and the sums are the same but for
    their order.
    """
    found = runs.job(4)[1][0]
    flat = found["locmoe, nodes, flat reduction"]["rows"]
    by_node = found["locmoe, nodes"]["rows"][: len(flat)]
    np.testing.assert_allclose(losses(by_node), losses(flat), rtol=0, atol=1e-6)
    for one, other in zip(by_node, flat):
        once = one["reduce_inter_node_bytes"]
        assert 2 * other["reduce_inter_node_bytes"] == pytest.approx(3 * once, rel=1e-3)
        assert other["reduce_inter_node_messages"] > 10 * one["reduce_inter_node_messages"]


def test_moving_experts_changes_where_and_never_what():
    """Two moves on the way."""
    found = runs.job(4)[1][0]
    moved = found["locmoe, nodes, moves"]["rows"]
    still = found["locmoe, nodes"]["rows"][: len(moved)]
    np.testing.assert_allclose(losses(moved), losses(still), rtol=0, atol=1e-6)
    for one, other in zip(still, moved):
        assert (other["load"], other["dropped"]) == (one["load"], one["dropped"])
    bytes_still, bytes_moved = (
        [row["inter_node_bytes"] for row in rows] for rows in (still, moved)
    )
    assert bytes_moved[:4] == bytes_still[:4]
    assert all(one != other for one, other in zip(bytes_still[4:], bytes_moved[4:]))


@pytest.mark.parametrize("ranks, name", [(3, "three nodes"), (2, "two levels")])
def test_the_ledger_counts_exactly_the_routed_tokens(ranks, name):
    """With one node for each rank, what crosses follows from the counts alone: four times a
    token's bytes.
    """
    case = cases.CASES[name]
    row = runs.job(ranks)[1][0][name]["rows"][0]
    load_NE = np.array(row["load"][0])
    hidden = 48
    held = np.arange(cases.EXPERTS) // (cases.EXPERTS // ranks)
    away = load_NE[held[None] != np.arange(ranks)[:, None]].sum()
    affinity = 4 * away
    assert case.nodes == ranks
    assert (row["intra_node_bytes"], row["inter_node_bytes"]) == (
        0,
        away * 4 * hidden * 4 + affinity,
    )


@pytest.mark.parametrize("name", cases.GRADIENTS)
def test_reduced_gradients_equal_those_of_one_process(name):
    folder, _ = runs.job(2)
    found: dict[str, np.ndarray] = {}
    for rank in (0, 1):
        with np.load(folder / f"gradients-{rank}.npz") as archive:
            own = {
                key.removeprefix(f"{name}: "): archive[key]
                for key in archive.files
                if key.startswith(f"{name}: ")
            }
        for weight in found.keys() & own.keys():
            np.testing.assert_array_equal(own[weight], found[weight], err_msg=weight)
        found.update(own)
    wanted = cases.single_gradients(cases.CASES[name])
    assert found.keys() == wanted.keys()
    whole = np.sqrt(sum(np.sum(value.astype(float) ** 2) for value in wanted.values()))
    for weight, value in wanted.items():
        difference = np.linalg.norm((found[weight] - value).astype(float))
        # A weight's small gradient is a sum of terms that cancel: its rounding is that of the
        # terms, not of the sum.
        assert difference <= 1e-6 * max(np.linalg.norm(value.astype(float)), 0.05 * whole), (
            f"{weight}: {difference} of {np.linalg.norm(value)}"
        )
    if name == "idle":
        assert all(
            not value.any()
            for weight, value in found.items()
            if ".experts." in weight and not weight.endswith(".0")
        )
