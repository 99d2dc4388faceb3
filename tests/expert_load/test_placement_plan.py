"""From a trace to a plan, its file, and against EPLB on the recorded traces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pangu_locmoe.config import parse_config
from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.placement import (
    FORMATS,
    Costs,
    load_plan,
    place_trace,
    plan,
    read_plan,
    save_placement,
    save_plan,
)
from pangu_locmoe.expert_load.trace import Trace, read_trace
from pangu_locmoe.train.policies.placement import starting_expert_of_slot

RECORDED = sorted((Path(__file__).parents[1] / "data" / "traces").glob("*.npz"))
COSTS = Costs.of_model(hidden_size=128, ffn_size=256)


def recent_mean(past: Trace, origin: int, horizon: int) -> np.ndarray:
    assert past.step_W[-1] < origin
    return past.share_WLE[-100:].mean(axis=0)


def made_up(nodes: int = 2, experts: int = 8, rows: int = 60) -> Trace:
    """Two layers; the nodes use different experts, and not the ones that are near."""
    random = np.random.default_rng(0)
    rate_LNE = 50 * random.gamma(1.0, 1.0, (2, nodes, experts))
    source_WLNE = random.poisson(rate_LNE, (rows, *rate_LNE.shape))
    return Trace(np.arange(1, rows + 1), source_WLNE.sum(axis=2), None, source_WLNE)


def test_figures_of_a_plan_within_the_trace():
    result = place_trace(made_up(), 2, 2, COSTS, recent_mean, origin=41, horizon=20)
    assert result.after.step_seconds < result.now.step_seconds
    assert result.after.inter_node_bytes < result.now.inter_node_bytes
    assert result.bytes_moved == result.experts_moved * COSTS.expert_bytes > 0
    assert result.actual_oracle.step_seconds <= result.actual_after.step_seconds * (1 + 1e-9)
    assert result.actual_now.inter_node_bytes > result.actual_after.inter_node_bytes
    assert "recorded, oracle" in result.format()


def test_beyond_the_trace_nothing_is_recorded():
    result = place_trace(made_up(), 2, 2, COSTS, recent_mean, copies=4)
    assert result.origin == 61
    assert result.actual_now is result.actual_after is result.actual_oracle is None
    assert [len(row) for row in result.expert_of_slot] == [12, 12]


def test_a_transient_layer_stays_and_gets_room():
    result = place_trace(
        made_up(), 2, 2, COSTS, recent_mean, copies=4, stable_from=lambda past: [None, 1]
    )
    assert result.state == ["transient", "stable"]
    blocks_RP = np.array(result.expert_of_slot[0]).reshape(4, 3)
    assert blocks_RP[:, :2].ravel().tolist() == list(range(8))
    load_WE = made_up().load_WLE[:, 0]
    held = (load_WE <= result.capacity_factor[0] * load_WE.mean(axis=1, keepdims=True)).mean()
    assert 0.98 < held < 1
    assert result.capacity_factor[1] is None
    assert "layer 0 is transient" in result.format()


def test_a_small_gain_is_not_worth_it():
    current = np.tile(np.arange(8), (2, 1))
    load_LNE = made_up().source_WLNE.mean(axis=0)
    gain = plan(load_LNE, 2, current, COSTS).gain
    assert gain > 0.01
    assert plan(load_LNE, 2, current, COSTS, min_gain=0.99).expert_of_slot == current.tolist()
    again = plan(load_LNE, 2, plan(load_LNE, 2, current, COSTS).expert_of_slot_LP, COSTS)
    assert again.gain < gain / 10


def test_nodes_that_merge_and_nodes_that_do_not():
    assert "merged" in place_trace(made_up(nodes=4), 2, 2, COSTS, recent_mean).notes[0]
    with pytest.raises(
        DataError,
        match=(
            "has 3 nodes, which do not merge evenly into 2: the locality policy needs that; "
            "eplb does not"
        ),
    ):
        place_trace(made_up(nodes=3), 2, 2, COSTS, recent_mean)
    trace = Trace(made_up().step_W, made_up().load_WLE)
    with pytest.raises(DataError, match="does not say which node tokens come from"):
        place_trace(trace, 2, 2, COSTS, recent_mean)
    assert (
        "every node is taken to send the same"
        in place_trace(trace, 2, 2, COSTS, recent_mean, "eplb").notes[0]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"origin": 1}, "no rows before it"),
        ({"horizon": 0}, "horizon"),
        ({"copies": 1}, "must be divisible by ranks"),
        ({"copies": -4}, "must not be negative"),
        ({"policy": "best"}, "unknown policy"),
        ({"groups": 3}, "divisible by groups"),
        ({"current": np.zeros((2, 8), dtype=int)}, "each at least once"),
        ({"current": np.zeros((1, 8), dtype=int)}, "must have 2 layers"),
        ({"current": np.tile(np.arange(12) % 8, (2, 1))}, "at most 8 are planned"),
    ],
)
def test_what_does_not_fit_is_one_line(options, message):
    with pytest.raises(DataError, match=message) as caught:
        place_trace(made_up(), 2, 2, COSTS, recent_mean, **options)
    assert "\n" not in str(caught.value)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    result = place_trace(
        made_up(),
        2,
        2,
        COSTS,
        recent_mean,
        origin=41,
        horizon=20,
        groups=2,
        stable_from=lambda past: [None, 1],
    )
    save_plan(result, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == result
    with pytest.raises(DataError, match="cannot be written"):
        save_plan(result, tmp_path / "nowhere" / "plan.json")


def test_the_files_key_of_a_placement_has_two_names():
    written = place_trace(made_up(), 2, 2, COSTS, recent_mean).to_dict()
    assert next(iter(written)) == "slot_to_expert"
    other = {"expert_of_slot" if key == "slot_to_expert" else key: written[key] for key in written}
    assert read_plan(other) == read_plan(written)
    with pytest.raises(DataError, match=r"expert_of_slot\[1\] lacks expert 7"):
        read_plan({**other, "expert_of_slot": [[*range(8)], [*range(7), 6]]})
    with pytest.raises(DataError, match="unknown key slot_to_expert"):
        read_plan({**other, "slot_to_expert": written["slot_to_expert"]})
    with pytest.raises(DataError, match="lacks the key slot_to_expert"):
        read_plan({key: other[key] for key in other if key != "expert_of_slot"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_to_expert": [[0, 1, 2, 3, 4, 5, 6, 6]] * 2}, "lacks expert 7"),
        ({"slot_to_expert": [[0, 1, 2, 3, 4, 5, 6, 8]] * 2}, "must be experts 0 to 7"),
        ({"slot_to_expert": [[0, 1, 2, 3, 4, 5, 6, 7.0]] * 2}, "must be experts 0 to 7"),
        ({"slot_to_expert": [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1]]}, "has 2 slots, the first layer 8"),
        ({"slot_to_expert": []}, "must be a list of layers"),
        ({"ranks_per_node": 3}, "not divisible by 6 ranks"),
        ({"nodes": True}, "nodes must be a positive integer"),
        ({"policy": "best"}, "policy must be eplb or locality"),
        ({"state": ["stable"]}, "state must be 2 values"),
        ({"state": ["transient", "stable"]}, r"capacity_factor\[0\]"),
        ({"now": {}}, "now lacks the key"),
        ({"costs": None}, "costs must be an object"),
        ({"bytes_moved": float("nan")}, "bytes_moved must be a number"),
        ({"bytes_moved": 10**400}, "bytes_moved must be a number"),
        ({"experts": 10**12}, "has 8 slots for 1000000000000 experts"),
        ({"more": 1}, "unknown key more"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path, change, message):
    path = tmp_path / "plan.json"
    path.write_text(
        json.dumps({**place_trace(made_up(), 2, 2, COSTS, recent_mean).to_dict(), **change})
    )
    with pytest.raises(DataError, match=message) as caught:
        load_plan(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null"])
def test_no_plan_at_all(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    for path in (tmp_path / "plan.json", tmp_path / "missing.json", tmp_path):
        with pytest.raises(DataError, match="not a plan"):
            load_plan(path)


def test_there_are_recorded_traces():
    assert RECORDED, "tests/data/traces has no *.npz: the comparison with EPLB did not run"


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
@pytest.mark.parametrize(("ranks_per_node", "copies"), [(2, 0), (4, 0), (4, 8)])
def test_beats_eplb_on_a_recorded_trace(path, ranks_per_node, copies):
    trace = read_trace(path)
    plans = {
        policy: place_trace(
            trace,
            2,
            ranks_per_node,
            COSTS,
            recent_mean,
            policy,
            copies=copies,
            origin=1200,
            horizon=1000,
        )
        for policy in ("eplb", "locality")
    }
    for policy_plan in plans.values():
        print(policy_plan.format())
    assert plans["locality"].after.step_seconds < plans["eplb"].after.step_seconds
    assert plans["locality"].after.step_seconds <= plans["locality"].now.step_seconds * (1 + 1e-8)
    assert plans["locality"].actual_after.step_seconds < plans["eplb"].actual_after.step_seconds


def job_config(start: object, **changed: int):
    """A job that fits the plans of `made_up` on 2 nodes of 2 ranks, apart from what is changed."""
    sizes = {"num_experts": 8, "num_moe_layers": 2, "expert_parallel": 4, **changed}
    return parse_config(
        {
            "model": {"num_layers": 4, "num_moe_layers": sizes["num_moe_layers"]},
            "moe": {"router": "switch", "levels": 1, "num_experts": sizes["num_experts"]},
            "parallel": {"expert_parallel": sizes["expert_parallel"]},
            "placement": {"start": start},
        }
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_job_begins_where_a_plan_has_its_experts(tmp_path, format):
    result = place_trace(made_up(), 2, 2, COSTS, recent_mean)
    file = tmp_path / "plan.json"
    save_placement(result, file, format)
    found_LE = starting_expert_of_slot(job_config(str(file)))
    np.testing.assert_array_equal(found_LE, result.expert_of_slot)
    assert (found_LE != np.arange(8)).any()
    np.testing.assert_array_equal(starting_expert_of_slot(job_config(found_LE.tolist())), found_LE)


@pytest.mark.parametrize(
    "changed, wanted",
    [
        ({"num_moe_layers": 1}, "the plan has 2 layers of 8 slots on 4 ranks, the run 1 of 8 on 4"),
        ({"num_experts": 16}, "the plan has 2 layers of 8 slots on 4 ranks, the run 2 of 16 on 4"),
        (
            {"expert_parallel": 2},
            "the plan has 2 layers of 8 slots on 4 ranks, the run 2 of 8 on 2",
        ),
    ],
)
def test_a_plan_for_another_job_is_refused(tmp_path, changed, wanted):
    file = tmp_path / "plan.json"
    save_plan(place_trace(made_up(), 2, 2, COSTS, recent_mean), file)
    with pytest.raises(DataError, match=f"^placement.start = '{file}': {wanted}$"):
        starting_expert_of_slot(job_config(str(file), **changed))


def test_a_plan_with_replicas_or_no_plan_is_refused(tmp_path):
    file = tmp_path / "plan.json"
    save_plan(place_trace(made_up(), 2, 2, COSTS, recent_mean, copies=4), file)
    with pytest.raises(DataError, match="the plan has 2 layers of 12 slots"):
        starting_expert_of_slot(job_config(str(file)))
    file.write_text('{"physical_to_logical_map": ' + str([[0, 1, 2, 3, 0, 1, 2, 3]] * 2) + "}")
    with pytest.raises(DataError, match="the plan has 4 experts in 8 slots, the run 8 experts"):
        starting_expert_of_slot(job_config(str(file)))
    absent = tmp_path / "absent.json"
    with pytest.raises(
        DataError,
        match=f"^placement.start = '{absent}': {absent}: not a plan: No such file or directory$",
    ):
        starting_expert_of_slot(job_config(str(absent)))
