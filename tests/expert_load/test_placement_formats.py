"""Placements in serving engines' files: what each engine reads, there and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.torch_writer import save

from pangu_locmoe.cli import main
from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.placement import (
    FORMATS,
    Costs,
    load_placement,
    place_trace,
    rebalance,
    save_placement,
)
from pangu_locmoe.expert_load.placement.spread import spread_copies
from pangu_locmoe.expert_load.trace import Trace, write_trace

# EPLB's published example
LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
NAMES = ("plan.json", "expert_map.json", "location.json", "eplb.json", "eplb.npz")
FORMAT_OF = dict(zip(NAMES, (*FORMATS, "eplb")))


def published_plan():
    trace = Trace(np.array([1]), np.array([LOAD]))
    costs = Costs.of_model(horizon=1)
    return place_trace(trace, 2, 4, costs, policy="eplb", groups=4, copies=4, horizon=1)


def test_what_the_engines_read(tmp_path):
    for name in NAMES:
        save_placement(published_plan(), tmp_path / name, FORMAT_OF[name])
    ascend = json.loads((tmp_path / "expert_map.json").read_text())
    assert ascend["moe_layer_count"] == 2 and len(ascend["layer_list"]) == 2
    first = ascend["layer_list"][0]
    assert (first["layer_id"], first["device_count"]) == (0, 8)
    assert first["device_list"][:2] == [
        {"device_id": 0, "device_expert": [5, 6]},
        {"device_id": 1, "device_expert": [5, 7]},
    ]
    # SGLang passes all keys on as arguments: there must be no other.
    assert json.loads((tmp_path / "location.json").read_text()) == {
        "physical_to_logical_map": PLACED
    }
    phy2log, log2phy, logcnt = rebalance(np.array(LOAD), 16, 4, 2, 8)
    lists = json.loads((tmp_path / "eplb.json").read_text())
    with np.load(tmp_path / "eplb.npz") as arrays:
        assert {key: arrays[key].tolist() for key in arrays.files} == lists
    assert lists["phy2log"] == PLACED == phy2log.tolist() and lists["logcnt"] == logcnt.tolist()
    assert np.sort(lists["log2phy"]).tolist() == np.sort(log2phy).tolist()
    assert lists["log2phy"][0][5] == [0, 2] and lists["log2phy"][0][0] == [12, -1]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_rank_holds_an_expert_twice_where_that_is_asked(data):
    """From any placement: every expert stays, and what was apart stays as it is."""
    nodes, per_node, room = (data.draw(st.integers(1, most)) for most in (2, 3, 4))
    ranks = nodes * per_node
    experts = data.draw(st.integers(room, ranks * room))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    copies = random.integers(0, experts, (3, ranks * room - experts))
    placement_LP = np.concatenate([np.tile(np.arange(experts), (3, 1)), copies], axis=1)
    placement_LP = random.permuted(placement_LP, axis=1)
    load_LE = random.integers(0, 100, (3, experts))
    spread_LP = spread_copies(placement_LP, load_LE, ranks, nodes)
    for before_P, after_P in zip(placement_LP, spread_LP):
        assert set(after_P) == set(range(experts))
        assert all(len(set(block)) == room for block in after_P.reshape(ranks, room))
        if all(len(set(block)) == room for block in before_P.reshape(ranks, room)):
            assert (before_P == after_P).all()
    again_LP = spread_copies(spread_LP, load_LE, ranks, nodes)
    np.testing.assert_array_equal(again_LP, spread_LP)


def test_a_second_copy_goes_to_the_node_and_the_load_that_are_nearest():
    load_LE = np.array([[8, 4, 5, 9, 4, 4]])
    placement_LP = np.array([[0, 0, 1, 2, 3, 4, 5, 4]])  # ranks of two slots, nodes of two ranks
    spread_LP = spread_copies(placement_LP, load_LE, 4, 2)
    assert spread_LP.tolist() == [[0, 1, 0, 2, 3, 4, 5, 4]]
    # Three copies for two ranks: the third becomes one of the hottest that its rank lacks.
    spread_LP = spread_copies(np.array([[0, 0, 0, 1, 2, 3]]), np.array([[9, 5, 1, 7]]), 2, 1)
    assert spread_LP.tolist() == [[0, 1, 3, 0, 2, 3]]


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_there_and_back(tmp_path_factory, data):
    """Any placement, with copies: the same slots from every format, and the ranks where the file
    has them.
    """
    ranks, room, layers = (data.draw(st.integers(1, most)) for most in (4, 3, 3))
    slots = ranks * room
    experts = data.draw(st.integers(max(1, room), slots))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    trace = Trace(np.array([1]), random.integers(0, 50, (1, layers, experts)))
    plan = place_trace(
        trace, 1, ranks, Costs.of_model(horizon=1), policy="eplb", copies=slots - experts, horizon=1
    )
    folder = tmp_path_factory.mktemp("formats")
    for name in NAMES:
        try:
            save_placement(plan, folder / name, FORMAT_OF[name])
        except DataError as error:
            blocks = plan.expert_of_slot_LP.reshape(layers * ranks, room)
            assert any(len(set(block)) < room for block in blocks.tolist())
            assert "on one rank, which vllm-ascend cannot load" in str(error)
            assert not (folder / name).exists()
            continue
        found = load_placement(folder / name)
        np.testing.assert_array_equal(found.expert_of_slot_LP, plan.expert_of_slot_LP)
        says = FORMAT_OF[name] in ("pangu-locmoe", "vllm-ascend")
        assert found.num_ranks == (ranks if says else None)


def test_files_of_others(tmp_path):
    """Without ids and counts, with other keys, as a .pt of SGLang, with copies in another order and
    more padding.
    """

    def found(value, name="a.json"):
        if name.endswith(".pt"):
            save(value, tmp_path / name)
        else:
            (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
        return load_placement(tmp_path / name).expert_of_slot_LP.tolist()

    devices = [{"device_expert": [2, 0]}, {"device_expert": [1, 2]}]
    assert found({"layer_list": [{"device_list": devices}], "strategy_version": 1}) == [
        [2, 0, 1, 2]
    ]
    ids = [{"layer_id": 3, "device_list": devices}, {"layer_id": 7, "device_list": devices}]
    assert found({"moe_layer_count": 2, "layer_list": ids}) == [[2, 0, 1, 2]] * 2
    assert found({"physical_to_logical_map": np.array([[1, 0, 1]])}, "a.pt") == [[1, 0, 1]]
    arrays = {"phy2log": [[1, 0, 1]], "log2phy": [[[1, -1, -1], [2, 0, -1]]], "logcnt": [[1, 2]]}
    assert found(arrays) == [[1, 0, 1]]


def layer(*experts, **more):
    devices = [{"device_expert": each} for each in experts]
    return {"layer_list": [{"device_list": devices, **more}]}


@pytest.mark.parametrize(
    "content, words",
    [
        ([], "must be an object"),
        ({}, "lacks the key"),
        ({"layer_list": []}, "layer_list must be a list of objects"),
        ({"layer_list": [[]]}, "layer_list must be a list of objects"),
        ({"layer_list": [{}]}, r"layer_list\[0\]\.device_list must be a list of objects"),
        (layer([0, 1], [2]), "equally many for each device"),
        (layer([0, 1], device_count=2), "device_count is 2, device_list has 1"),
        ({**layer([0, 1]), "moe_layer_count": 3}, "moe_layer_count is 3, layer_list has 1"),
        (layer([0, 2]), "must be experts from 0 to less than 2"),
        (layer([0, 2, 2]), "lacks expert 1"),
        (layer([0, "1"]), "must be experts"),
        (layer([0, 0.5]), "must be experts"),
        (layer([0, None]), "must be experts"),
        (
            {"layer_list": [{"device_list": [{"device_id": 1, "device_expert": [0]}] * 2}]},
            "device_id must rise; vllm-ascend goes by the order",
        ),
        ({"physical_to_logical_map": [[0, 1], [0]]}, "equally many slots for each layer"),
        ({"physical_to_logical_map": [[0, -1]]}, "must be experts from 0"),
        ({"physical_to_logical_map": [0, 1]}, "equally many slots for each layer"),
        ({"physical_to_logical_map": None}, "must be experts"),
        ({"phy2log": [[0, 1]]}, "lacks log2phy"),
        (
            {"phy2log": [[0, 1]], "log2phy": [[[0], [0]]], "logcnt": [[1, 1]]},
            "log2phy does not belong to phy2log",
        ),
        (
            {"phy2log": [[0, 1]], "log2phy": [[[0], [1]]], "logcnt": [[1, 2]]},
            "logcnt does not belong to phy2log",
        ),
        (
            {"phy2log": [[0, 1]], "log2phy": [[[0], [1, 2]]], "logcnt": [[1, 1]]},
            "log2phy does not belong to phy2log",
        ),
    ],
)
def test_files_that_are_none(tmp_path, content, words):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=rf"^{file}: not a plan: .*{words}") as said:
        load_placement(file)
    assert "\n" not in str(said.value)


def test_files_that_are_damaged(tmp_path):
    file = tmp_path / "eplb.npz"
    save_placement(published_plan(), file, "eplb")
    content = file.read_bytes()
    for damaged in (content[:-30], content[:100], b"PK", b"{", b"", b"\xff"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"eplb\.npz: not a plan: ") as said:
            load_placement(file)
        assert "\n" not in str(said.value)
    with pytest.raises(DataError, match=r"absent\.json: not a plan: No such file"):
        load_placement(tmp_path / "absent.json")
    with pytest.raises(DataError, match=r"a\.json: cannot be written: No such file"):
        save_placement(published_plan(), tmp_path / "absent" / "a.json", "sglang")


@pytest.mark.parametrize("name", NAMES)
def test_place_writes_it_and_starts_from_it(tmp_path, capsys, name):
    write_trace(tmp_path / "row.npz", Trace(np.array([1]), np.array([LOAD])))
    command = ["load", "place", tmp_path / "row.npz", "--policy", "eplb", "--nodes", 2]
    command += ["--ranks-per-node", 4, "--groups", 4, "--copies", 4, "--format", FORMAT_OF[name]]
    command += ["--output", tmp_path / name, "--json"]
    assert main([*map(str, command)]) == 0
    moved = json.loads(capsys.readouterr().out)["experts_moved"]
    assert moved > 0 and load_placement(tmp_path / name).expert_of_slot_LP.tolist() == PLACED
    assert main([*map(str, command), "--current", str(tmp_path / name)]) == 0
    assert json.loads(capsys.readouterr().out)["experts_moved"] == 0


def test_a_plan_that_an_engine_cannot_load_leaves_no_file(tmp_path, capsys):
    write_trace(tmp_path / "row.npz", Trace(np.array([1]), np.array([[[100, 1, 1]]])))
    output = tmp_path / "expert_map.json"
    command = ["load", "place", str(tmp_path / "row.npz"), "--policy", "eplb", "--nodes", "1"]
    command += ["--ranks-per-node", "1", "--copies", "1", "--output", str(output)]
    # One rank of four slots for three experts: there is no other way.
    assert main([*command, "--format", "vllm-ascend"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        "pangu-locmoe: layer 0, rank 0: two copies of expert 0 on one rank, which vllm-ascend "
        "cannot load; give fewer copies\n"
    )
    assert not output.exists()
