"""Dumps of serving engines: slots summed to experts, ranks and moments joined, and every damaged
file one line that names it and its key.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.torch_writer import Call, Name, save

from pangu_locmoe.cli import main
from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load import placement
from pangu_locmoe.expert_load.importing import FORMATS, import_trace
from pangu_locmoe.expert_load.trace import read_trace

DUMPS = Path(__file__).resolve().parents[1] / "data" / "dumps"  # PyTorch 2.13.0 wrote these
MAP = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3]]
MAP_KEY = "last_physical_to_logical_map"


def summed(count_XLP, map_LP, num_experts):
    """By the definition, one number after the other."""
    count_XLP = np.asarray(count_XLP)
    sum_XLE = np.zeros((*count_XLP.shape[:-1], num_experts), int)
    for place in np.ndindex(count_XLP.shape):
        *lead, layer, slot = place
        sum_XLE[(*lead, layer, map_LP[layer][slot])] += count_XLP[place]
    return sum_XLE


def write_json(path, value):
    text = value if isinstance(value, str) else json.dumps(value)
    content = text.encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


# --- SGLang ---


def test_sglang_stat(tmp_path):
    trace = import_trace(DUMPS / "sglang_stat.pt")
    np.testing.assert_array_equal(trace.load_WLE, np.arange(24).reshape(2, 3, 4))
    assert trace.step_W.tolist() == [0, 1] and trace.source_WLNE is None
    assert import_trace(DUMPS / "sglang_stat.pt", num_experts=6).load_WLE.shape == (2, 3, 6)

    buffer = np.zeros((8, 2, 3), np.int32)
    buffer[[0, 1, 3]] = np.arange(18).reshape(3, 2, 3)
    trace = import_trace(save({"rank": 0, "logical_count": buffer}, tmp_path / "a.pt"))
    np.testing.assert_array_equal(trace.load_WLE, buffer[:4])  # what the buffer did not hold is out


def test_sglang_stat_of_several_files(tmp_path):
    """Dumps of a rank follow each other; equal sums of two ranks count once, others add up."""
    count = np.arange(1, 25, dtype=np.int64).reshape(4, 2, 3)
    early = save({"rank": 0, "logical_count": count[:3]}, tmp_path / "a.pt")
    late = save({"rank": 0, "logical_count": count[3:]}, tmp_path / "b.pt")
    np.testing.assert_array_equal(import_trace([early, late]).load_WLE, count)
    equal = save({"rank": 1, "logical_count": count[:3]}, tmp_path / "c.pt")
    np.testing.assert_array_equal(import_trace([early, equal]).load_WLE, count[:3])
    other = save({"rank": 1, "logical_count": 10 * count[:3]}, tmp_path / "d.pt")
    np.testing.assert_array_equal(import_trace([early, other]).load_WLE, 11 * count[:3])
    later = save({"rank": 1, "logical_count": count[3:]}, tmp_path / "f.pt")
    np.testing.assert_array_equal(import_trace([early, equal, later, late]).load_WLE, count)
    with pytest.raises(DataError, match=r"ranks have 3, 1 passes in one dump"):
        import_trace([early, later])
    wider = save({"rank": 1, "logical_count": np.ones((3, 2, 4))}, tmp_path / "e.pt")
    with pytest.raises(DataError, match=r"e\.pt: logical_count has \[2, 4\] layers and experts"):
        import_trace([early, wider])


def record(number, rank, count, key="primary", **more):
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": key,
        "global_physical_count": np.asarray(count, np.int32),
        **more,
    }


def test_sglang_passes_of_one_rank():
    trace = import_trace(DUMPS / "sglang_per_token_rank1.pt")
    count = np.arange(12).reshape(2, 6) * np.array([7, 8])[:, None, None]
    np.testing.assert_array_equal(trace.load_WLE, summed(count, MAP, 4))
    assert trace.step_W.tolist() == [7, 8] and trace.source_WLNE is None


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_sglang_passes_of_several_ranks(tmp_path_factory, data):
    """Any ranks, passes, replicas and maps that differ by rank: source and load are those of a
    plain sum.
    """
    folder = tmp_path_factory.mktemp("passes")
    ranks, layers, experts = (data.draw(st.integers(1, most)) for most in (4, 3, 5))
    slots = experts + data.draw(st.integers(0, 3))
    per_node = data.draw(st.integers(1, 3))
    steps = sorted(data.draw(st.sets(st.integers(0, 50), min_size=1, max_size=4)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    files = []
    expected = np.zeros((len(steps), layers, (ranks - 1) // per_node + 1, experts), int)
    for rank in range(ranks):
        first = [np.concatenate([np.arange(experts), random.integers(0, experts, slots - experts)])]
        map_LP = np.stack([random.permutation(first[0]) for _ in range(layers)])
        count_WLP = random.integers(1, 9, (len(steps), layers, slots))
        expected[:, :, rank // per_node] += summed(count_WLP, map_LP, experts)
        records = [record(step, rank, count) for step, count in zip(steps, count_WLP)]
        content = {"records": data.draw(st.permutations(records)), MAP_KEY: map_LP}
        files.append(save(content, folder / f"{rank}.pt"))
    trace = import_trace(data.draw(st.permutations(files)), ranks_per_node=per_node)
    assert trace.step_W.tolist() == steps
    np.testing.assert_array_equal(trace.load_WLE, expected.sum(axis=2))
    if ranks == 1:
        assert trace.source_WLNE is None
    else:
        np.testing.assert_array_equal(trace.source_WLNE, expected)


def test_sglang_counts_of_what_was_received_have_no_source(tmp_path):
    """Behind DeepEP's low latency a rank counts its own slots: where tokens come from is unknown."""
    files = []
    for rank in range(2):
        count = np.zeros((2, 6), int)
        count[:, 3 * rank : 3 * rank + 3] = 5 + rank
        content = {"records": [record(1, rank, count)], MAP_KEY: np.array(MAP)}
        files.append(save(content, tmp_path / f"{rank}.pt"))
    trace = import_trace(files)
    assert trace.source_WLNE is None
    assert trace.load_WLE.tolist() == [[[11, 11, 5, 6], [6, 5, 5, 17]]]


def test_sglang_passes_of_two_micro_batches_and_of_tokens(tmp_path):
    ids = np.array([[[0, 4], [5, -1]], [[0, 4], [-1, -1]]], np.int32)
    records = [
        record(3, 0, np.ones((2, 6)), "child_a"),
        record(3, 0, np.ones((2, 6)), "child_b"),
        {"forward_pass_id": 4, "rank": 0, "topk_ids_of_layer": ids},
        {"forward_pass_id": 5, "rank": 0, "topk_ids_of_layer": ids[:, :0]},
    ]
    trace = import_trace(save({"records": records, MAP_KEY: np.array(MAP)}, tmp_path / "a.pt"))
    assert trace.load_WLE.tolist() == [
        [[4, 4, 2, 2], [2, 2, 2, 6]],
        [[2, 1, 0, 0], [0, 0, 0, 2]],
        [[0] * 4, [0] * 4],
    ]


def test_sglang_simulator(tmp_path):
    count = np.arange(24).reshape(2, 2, 6)
    content = {
        "global_physical_count_of_forward_pass": count,
        "forward_pass_ids": [4, 9],
        MAP_KEY: np.array(MAP),
    }
    trace = import_trace(save(content, tmp_path / "a.pt"))
    assert trace.step_W.tolist() == [4, 9]
    np.testing.assert_array_equal(trace.load_WLE, summed(count, MAP, 4))
    with pytest.raises(DataError, match="forward_pass_ids must be a list of 2 integers"):
        import_trace(save({**content, "forward_pass_ids": [4]}, tmp_path / "a.pt"))


@pytest.mark.parametrize(
    "content, words",
    [
        (np.ones((2, 3, 4)), "holds a ndarray, not what the recorder dumps"),
        ({"rank": 0}, "has neither logical_count nor records, has rank"),
        ({"logical_count": np.ones((2, 3))}, r"logical_count must be numbers \[passes, layers"),
        ({"logical_count": np.zeros((0, 2, 3))}, r"is empty: it has shape \[0, 2, 3\]"),
        ({"logical_count": np.zeros((4, 2, 3))}, "no tokens in any pass"),
        ({"logical_count": -np.ones((4, 2, 3))}, "a number below 0"),
        ({"logical_count": np.full((4, 2, 3), 0.5)}, "not whole"),
        ({"logical_count": np.full((4, 2, 3), np.nan)}, "not whole"),
        ({"logical_count": np.ones((4, 2, 3), bool)}, "is bool"),
        ({"logical_count": None}, "is absent"),
        ({"logical_count": "4"}, "must be numbers"),
        ({"logical_count": np.ones((1, 2, 3)), "rank": -1}, "rank must be an integer"),
        ({"records": [], MAP_KEY: np.array(MAP)}, "records is empty"),
        ({"records": 3, MAP_KEY: np.array(MAP)}, "records in some files"),
        ({"records": [3], MAP_KEY: np.array(MAP)}, r"records\[0\] must be a dict"),
        ({"records": [record(1, 0, np.ones((2, 6)))]}, f"{MAP_KEY} must be .*absent"),
        (
            {"records": [record(1, 0, np.ones((2, 5)))], MAP_KEY: np.array(MAP)},
            r"records\[0\]\.global_physical_count has shape \[2, 5\], the map \[2, 6\]",
        ),
        (
            {"records": [record(1, 0, np.ones((2, 6)))] * 2, MAP_KEY: np.array(MAP)},
            "forward pass 1 of rank 0 is there twice",
        ),
        (
            {"records": [record(True, 0, np.ones((2, 6)))], MAP_KEY: np.array(MAP)},
            "forward_pass_id must be an integer",
        ),
        (
            {"records": [record(1, 0, np.ones((2, 6)))], MAP_KEY: np.array(MAP) + 10**6},
            f"{MAP_KEY} must be experts 0 to 65535",
        ),
        (
            {"records": [record(1, 0, np.ones((2, 6)))], MAP_KEY: np.array(MAP) - 2},
            f"{MAP_KEY} must be experts",
        ),
        (
            {"records": [record(1, 0, np.ones((2, 6)))], MAP_KEY: np.array(MAP) - 1},
            "layer 0 has tokens in a slot that holds no expert",
        ),
        (
            {"records": [{"forward_pass_id": 1, "topk_ids_of_layer": np.full((2, 1, 1), 6)}]}
            | {MAP_KEY: np.array(MAP)},
            "must be slots 0 to 5 of 2 layers",
        ),
    ],
)
def test_sglang_files_that_are_none(tmp_path, capsys, content, words):
    file = save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=rf"^{file}: .*{words}"):
        import_trace(file)
    assert main(["load", "import", str(file), "--output", str(tmp_path / "o.npz")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "o.npz").exists()


def test_sglang_maps_and_modes_that_do_not_go_together(tmp_path):
    content = {"records": [record(1, 0, np.ones((2, 6)))], MAP_KEY: np.array(MAP)}
    file = save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match="must be experts 0 to 2"):
        import_trace(file, num_experts=3)
    assert import_trace(file, num_experts=5).load_WLE.shape == (1, 2, 5)
    with pytest.raises(DataError, match="records in some files and not in others"):
        import_trace([file, DUMPS / "sglang_stat.pt"])
    narrow = {"records": [record(1, 1, np.ones((1, 4)))], MAP_KEY: np.array([[0, 1, 2, 3]])}
    with pytest.raises(DataError, match="maps of different shapes"):
        import_trace([file, save(narrow, tmp_path / "b.pt")])


def test_an_attack_through_the_command_is_one_line(tmp_path, capsys):
    mark = tmp_path / "attacked"
    attack = Call(Name("os", "system"), (f"touch {mark}",))
    file = save({"logical_count": np.ones((1, 2, 3)), "x": attack}, tmp_path / "a.pt")
    assert main(["load", "import", str(file), "--output", str(tmp_path / "o.npz")]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"pangu-locmoe: {file}: holds 'os.system', which is neither a tensor nor a plain "
        "container: not read\n"
    )
    assert list(tmp_path.iterdir()) == [file]


def test_sglang_tables_of_ranks_and_moments(tmp_path):
    def table(name, *lines):
        return write_json(tmp_path / name, "\n".join(("layer_id,expert_id,count", *lines)) + "\n")

    files = [
        table("expert_distribution_rank1_timestamp1744347752.25.csv", "3,1,6", "5,0,1"),
        table("expert_distribution_rank0_timestamp1744347750.5.csv", "3,0,4", "5,2,9"),
        table("expert_distribution_rank1_timestamp1744347750.006448.csv", "3,1,2", "5,0,3"),
        table("expert_distribution_rank0_timestamp1744347752.csv", "5,1,8", "3,2,7"),
    ]
    trace = import_trace(files)
    assert trace.step_W.tolist() == [0, 1]
    assert trace.source_WLNE.tolist() == [
        [[[4, 0, 0], [0, 2, 0]], [[0, 0, 9], [3, 0, 0]]],
        [[[0, 0, 7], [0, 6, 0]], [[0, 8, 0], [1, 0, 0]]],
    ]
    assert import_trace(files, ranks_per_node=2).source_WLNE.shape == (2, 2, 1, 3)
    assert import_trace(files[1]).source_WLNE is None
    plain = [table("a.csv", "0,1,2"), table("b.csv.gz", "0,0,3")]
    assert import_trace(plain).load_WLE.tolist() == [[[3, 2]]]
    assert import_trace(table("c.txt", "0,1,2")).load_WLE.tolist() == [[[0, 2]]]
    with pytest.raises(DataError, match=r"d\.csv, line 2: count must be a whole number"):
        import_trace(table("d.csv", "0,1,-2"))
    with pytest.raises(DataError, match=r"line 1: the header must be layer_id,expert_id,count, is"):
        import_trace(write_json(tmp_path / "e.csv", "layer_id,expert_id,ratio\n"))


# --- vLLM ---

MODEL = {
    "model_name": "m",
    "world_size": 2,
    "num_moe_layers": 2,
    "num_physical_experts": 6,
    "num_logical_experts": 4,
    "num_redundant_experts": 2,
    "window_size": 100,
}


def snapshot(step, load, map_LP=MAP, **more):
    return {
        "step": step,
        "window_expert_load": np.asarray(load).tolist(),
        "latest_expert_load": np.asarray(load).tolist(),
        "physical_to_logical_map": map_LP,
        **more,
    }


LOADS = np.arange(24).reshape(2, 2, 6)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("indent", [None, 1])
def test_vllm_snapshots(tmp_path, name, indent):
    other = [[3, 2, 1, 0, 0, 0], [0, 1, 2, 3, 1, 2]]  # experts moved between the snapshots
    snapshots = [snapshot(6000, LOADS[1], other), snapshot(3000, LOADS[0])]
    if "jsonl" in name:
        text = "".join(json.dumps({**MODEL, **each}) + "\n" for each in snapshots)
    else:
        text = json.dumps({**MODEL, "snapshots": snapshots}, indent=indent)
    trace = import_trace(write_json(tmp_path / name, text))
    assert trace.step_W.tolist() == [3000, 6000] and trace.source_WLNE is None
    np.testing.assert_array_equal(trace.load_WLE[0], summed(LOADS[0], MAP, 4))
    np.testing.assert_array_equal(trace.load_WLE[1], summed(LOADS[1], other, 4))


def test_vllm_snapshots_of_little(tmp_path):
    """No model keys, one map for all, one snapshot alone, the same one twice, several files, experts
    without a slot of their own and empty slots.
    """
    bare = {"physical_to_logical_map": MAP, "snapshots": [{"step": 1}]}
    bare["snapshots"][0]["window_expert_load"] = LOADS[0].tolist()
    expected = summed(LOADS[0], MAP, 4)
    np.testing.assert_array_equal(
        import_trace(write_json(tmp_path / "a.json", bare)).load_WLE[0], expected
    )
    alone = write_json(tmp_path / "b.json", snapshot(1, LOADS[0]))
    np.testing.assert_array_equal(import_trace(alone).load_WLE[0], expected)
    second = write_json(tmp_path / "c.json", {"snapshots": [snapshot(2, LOADS[1])] * 2})
    assert import_trace([second, alone]).step_W.tolist() == [1, 2]
    empty = {"snapshots": [snapshot(1, [[3, 4, 0]], [[0, 2, -1]])]}
    file = write_json(tmp_path / "d.json", empty)
    assert import_trace(file).load_WLE.tolist() == [[[3, 0, 4]]]
    assert import_trace(file, num_experts=4).load_WLE.tolist() == [[[3, 0, 4, 0]]]


@pytest.mark.parametrize(
    "content, words",
    [
        ({"snapshots": []}, "snapshots is empty"),
        ({"snapshots": {}}, "snapshots must be a list, is dict"),
        ({"snapshots": [3]}, r"snapshots\[0\] must be an object, is int"),
        ([{"snapshots": []}], "must be a JSON object, is list"),
        ('{"snapshots": [', "not JSON"),
        ({"snapshots": [snapshot(None, LOADS[0])]}, r"snapshots\[0\]\.step must be an integer"),
        ({"snapshots": [snapshot(-1, LOADS[0])]}, "step must be an integer from 0"),
        ({"snapshots": [snapshot(1, LOADS)]}, r"numbers \[layers, slots\], is int64 \[2, 2, 6\]"),
        ({"snapshots": [snapshot(1, -LOADS[0])]}, "window_expert_load holds a number below 0"),
        ({"snapshots": [{"step": 1}]}, "window_expert_load must be numbers .*absent"),
        (
            {"snapshots": [{"step": 1, "window_expert_load": [[1, 2], [3]]}]},
            "lists of unequal lengths",
        ),
        (
            {"snapshots": [{"step": 1, "window_expert_load": [[1, 2]]}]},
            "physical_to_logical_map must be numbers .*absent",
        ),
        (
            '{"snapshots": [{"step": 1, "window_expert_load": [[NaN, 2]], '
            '"physical_to_logical_map": [[0, 1]]}]}',
            "not whole",
        ),
        (
            {"snapshots": [snapshot(1, LOADS[0], MAP[:1])]},
            "has 1 layers and 6 slots, the counts have 2 and 6",
        ),
        (
            {"num_logical_experts": 3, "snapshots": [snapshot(1, LOADS[0])]},
            "must be experts 0 to 2",
        ),
        ({"num_logical_experts": 0, "snapshots": [snapshot(1, LOADS[0])]}, "num_logical_experts"),
        (
            {"snapshots": [snapshot(1, LOADS[0]), snapshot(1, LOADS[1])]},
            "step 1 is there twice, with different loads",
        ),
        (
            {"snapshots": [snapshot(1, LOADS[0]), snapshot(2, [[1, 2]], [[0, 1]])]},
            r"has layers and experts \[1, 2\], the first snapshot \[2, 4\]",
        ),
        (
            {"snapshots": [snapshot(1, [[1, 2]], [[0, 0]]), snapshot(2, [[1, 2]], [[0, 1]])]},
            r"has layers and experts \[1, 2\], the first snapshot \[1, 1\]",
        ),
    ],
)
def test_vllm_files_that_are_none(tmp_path, capsys, content, words):
    file = write_json(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=rf"^{file}: .*{words}"):
        import_trace(file, format="vllm")
    arguments = ["load", "import", str(file), "--output", str(tmp_path / "o.npz")]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1 and list(tmp_path.iterdir()) == [file]


def test_vllm_lines_are_named(tmp_path):
    text = json.dumps(snapshot(1, LOADS[0])) + "\n{\n"
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON"):
        import_trace(write_json(tmp_path / "a.jsonl", text))


# --- vllm-ascend ---


def test_vllm_ascend_with_and_without_a_map(tmp_path):
    """Layers, ranks, slots of a rank; the iteration is in the name."""
    loads = np.arange(1, 25).reshape(2, 2, 2, 3)
    files = [tmp_path / "moe_load_1000.npy", tmp_path / "moe_load_200.npy"]
    for file, load in zip(files, loads):
        np.save(file, load)
    plain = import_trace(files)
    assert plain.step_W.tolist() == [200, 1000] and plain.source_WLNE is None
    np.testing.assert_array_equal(plain.load_WLE, loads[::-1].reshape(2, 2, 6))
    default = import_trace(files[0], num_experts=4)
    np.testing.assert_array_equal(
        default.load_WLE, summed(loads[:1].reshape(1, 2, 6), [[0, 1, 2, 3, 0, 1]] * 2, 4)
    )
    devices = [
        [{"device_id": rank, "device_expert": row[3 * rank : 3 * rank + 3]} for rank in range(2)]
        for row in MAP
    ]
    layers = [
        {"layer_id": layer, "device_count": 2, "device_list": each}
        for layer, each in enumerate(devices)
    ]
    content = {"moe_layer_count": 2, "layer_list": layers}
    expert_map = write_json(tmp_path / "expert_map.json", content)
    mapped = import_trace(files, expert_map=expert_map)
    np.testing.assert_array_equal(mapped.load_WLE, summed(loads[::-1].reshape(2, 2, 6), MAP, 4))
    stages = tmp_path / "moe_load_7.npy"
    np.save(stages, loads)  # [stages, layers, ranks, slots]
    np.testing.assert_array_equal(import_trace(stages).load_WLE[0], loads.sum(axis=0).reshape(2, 6))
    np.save(tmp_path / "load.npy", loads[0, :, 0])
    assert import_trace(tmp_path / "load.npy").load_WLE.tolist() == [loads[0, :, 0].tolist()]


def test_vllm_ascend_files_that_are_none(tmp_path):
    def refused(array, words, **options):
        file = tmp_path / "moe_load_1.npy"
        np.save(file, array)
        with pytest.raises(DataError, match=rf"^{file}: .*{words}"):
            import_trace(file, **options)

    refused(np.ones(3), r"moe_load must be numbers \[layers, ranks, slots of a rank\]")
    refused(np.zeros((2, 0, 3)), "is empty")
    refused(np.full((1, 1, 2), -1), "below 0")
    refused(np.ones((1, 1, 2), object), "not a whole .npy of numbers: Object arrays")
    expert_map = write_json(tmp_path / "m.json", {"physical_to_logical_map": [[0, 1, 1]]})
    refused(np.ones((1, 1, 2)), "the map has 1 layers and 3 slots", expert_map=expert_map)
    refused(np.ones((1, 1, 2)), "absent.json: not a plan", expert_map=tmp_path / "absent.json")
    good = tmp_path / "moe_load_1.npy"
    content = good.read_bytes()
    good.write_bytes(content[:-3])
    with pytest.raises(DataError, match=r"not a whole \.npy"):
        import_trace(good)
    good.write_bytes(content)
    (tmp_path / "b").mkdir()
    shutil.copy(good, tmp_path / "b" / good.name)
    with pytest.raises(DataError, match="iteration 1 is there twice"):
        import_trace([good, tmp_path / "b" / good.name])
    np.save(tmp_path / "moe_load_2.npy", np.ones((2, 1, 2)))
    with pytest.raises(DataError, match=r"slots \[2, 1, 2\], .* has \[1, 1, 2\]"):
        import_trace([good, tmp_path / "moe_load_2.npy"])


# --- Hugging Face ---


def test_hugging_face_router_logits_in_every_shape(tmp_path):
    random = np.random.default_rng(3)
    logits = random.normal(size=(3, 2, 5, 4)).astype(np.float32)  # layers, batch, sequence, experts
    order = np.argsort(-logits, axis=-1)[..., :2].reshape(3, -1)
    expected = [np.bincount(row, minlength=4).tolist() for row in order]
    flat = logits.reshape(3, 10, 4)
    saved = {
        "a": {"router_logits": logits, "labels": np.ones(3), "other_1": flat[0]},
        "b": {"router_logits": flat.astype(np.float64)},
        "c": {f"arr_{layer}": flat[layer] for layer in (2, 0, 1)},
        "d": {
            f"model.layers.{2 * layer}.router_logits_{layer + 9}": flat[layer]
            for layer in (1, 2, 0)
        },
        "e": {"gates": flat},
    }
    for name, arrays in saved.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        trace = import_trace(tmp_path / f"{name}.npz", top_k=2)
        assert trace.load_WLE.tolist() == [expected] and trace.step_W.tolist() == [0]
    both = [tmp_path / "a.npz", tmp_path / "b.npz"]
    assert import_trace(both, top_k=2).step_W.tolist() == [0, 1]
    assert import_trace(both, top_k=4, num_experts=5).load_WLE[1].tolist() == [[10] * 4 + [0]] * 3
    ties = {"router_logits": np.zeros((1, 2, 3)), "num_experts_per_tok": 2}
    np.savez(tmp_path / "t.npz", **ties)
    assert import_trace(tmp_path / "t.npz").load_WLE.tolist() == [[[2, 2, 0]]]


def test_hugging_face_files_that_are_none(tmp_path):
    def refused(words, top_k=2, **arrays):
        file = tmp_path / "a.npz"
        np.savez(file, **arrays)
        with pytest.raises(DataError, match=rf"^{file}: .*{words}"):
            import_trace(file, top_k=top_k)

    logits = np.ones((1, 2, 3))
    refused("need top_k", top_k=None, router_logits=logits)
    refused("num_experts_per_tok is 1, top_k says 2", router_logits=logits, num_experts_per_tok=1)
    for wrong in (0, 1.5, [1]):
        refused("must be a whole number", None, router_logits=logits, num_experts_per_tok=wrong)
    refused("has 3 experts, fewer than top_k 4", top_k=4, router_logits=np.ones((1, 2, 3)))
    refused("must be floating-point logits, is int64", router_logits=np.ones((1, 2, 3), int))
    refused("holds NaN", router_logits=np.full((1, 2, 3), np.nan))
    refused("is empty", router_logits=np.ones((1, 0, 3)))
    refused(r"router_logits must be \[layers", router_logits=np.ones(3))
    refused("Object arrays cannot be loaded", router_logits=np.array([None, 1]))
    refused("has neither router_logits nor an array for each layer", a=np.ones(3), b=np.ones(2))
    refused("are of the same layer", a_1=np.ones((2, 3)), b_1=np.ones((2, 3)))
    refused("layers differ in experts", a_1=np.ones((2, 3)), a_2=np.ones((2, 4)))
    refused("is a load trace already", step=np.ones(1), load=np.ones((1, 1, 2)))
    file = tmp_path / "a.npz"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"a\.npz: a damaged archive"):
        import_trace(file, top_k=2)


# --- which format ---


def test_the_format_is_told_by_the_file_or_by_the_user(tmp_path):
    assert import_trace(DUMPS / "sglang_stat.pt", format="sglang").load_WLE.shape == (2, 3, 4)
    renamed = tmp_path / "dump"
    shutil.copy(DUMPS / "sglang_stat.pt", renamed)
    assert import_trace(renamed).load_WLE.shape == (2, 3, 4)
    table = write_json(tmp_path / "table.txt", "step,layer,expert,tokens\n1,0,0,3\n")
    with pytest.raises(DataError, match="line 1: not JSON"):
        import_trace(table)
    assert import_trace(table, format="csv").load_WLE.tolist() == [[[3]]]
    for name in FORMATS:
        if name != "sglang":
            with pytest.raises(DataError, match=str(renamed)):
                import_trace(renamed, format=name, top_k=1 if name == "huggingface" else None)
    with pytest.raises(DataError, match="unknown format 'torch': megatron, csv, sglang"):
        import_trace(renamed, format="torch")
    with pytest.raises(DataError, match=r"is csv, .* is sglang; give files of one kind"):
        import_trace([renamed, write_json(tmp_path / "t.csv", "step,layer,expert,tokens\n")])
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        import_trace(tmp_path)
    with pytest.raises(DataError, match="dump: is given twice"):
        import_trace([renamed, renamed])


def test_the_command_knows_every_format(capsys):
    for verb, formats in (("import", FORMATS), ("place", placement.FORMATS)):
        with pytest.raises(SystemExit):
            main(["load", verb, "--help"])
        assert f"--format {{{','.join(formats)}}}" in capsys.readouterr().out


def test_too_large_a_trace_is_refused_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("pangu_locmoe.expert_load.importing.arrays.LARGEST_TRACE", 100)
    np.save(tmp_path / "moe_load_1.npy", np.ones((2, 1, 3)))
    np.savez(tmp_path / "a.npz", router_logits=np.ones((2, 1, 3)), num_experts_per_tok=1)
    write_json(tmp_path / "a.json", {"snapshots": [snapshot(1, LOADS[0])]})
    content = {"records": [record(1, 0, np.ones((2, 6)))], MAP_KEY: np.array(MAP)}
    save(content, tmp_path / "a.pt")
    save({"logical_count": np.ones((1, 2, 4))}, tmp_path / "b.pt")
    for name in ("moe_load_1.npy", "a.npz", "a.json", "a.pt", "b.pt"):
        with pytest.raises(DataError, match=rf"{name}: .* are more than 100 counts"):
            import_trace(tmp_path / name, num_experts=51)


def test_more_experts_than_the_user_says_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", router_logits=np.ones((2, 1, 3)), num_experts_per_tok=1)
    for file in (DUMPS / "sglang_stat.pt", tmp_path / "a.npz"):
        with pytest.raises(DataError, match=r"the file has [34] experts, num_experts says 2"):
            import_trace(file, num_experts=2)


def test_options_that_a_format_has_no_use_for_are_refused(tmp_path):
    file = DUMPS / "sglang_stat.pt"
    with pytest.raises(DataError, match="top_k is for huggingface, the format is sglang"):
        import_trace(file, top_k=2)
    with pytest.raises(DataError, match="expert_map is for vllm-ascend"):
        import_trace(file, expert_map=tmp_path / "m.json")
    dump = write_json(tmp_path / "a.json", {"snapshots": [snapshot(1, LOADS[0])]})
    with pytest.raises(DataError, match="ranks_per_node is for megatron, csv, sglang"):
        import_trace(dump, ranks_per_node=2)


def test_the_command_takes_several_files(tmp_path, capsys):
    files = []
    for rank in range(2):
        content = {"records": [record(5, rank, np.ones((2, 6)))], MAP_KEY: np.array(MAP)}
        files.append(str(save(content, tmp_path / f"{rank}.pt")))
    output = tmp_path / "o.npz"
    command = ["load", "import", *files, "--ranks-per-node", "1", "--output", str(output)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{output}: 1 rows, steps 5 to 5, 2 layers, 4 experts\n"
    assert read_trace(output).source_WLNE.shape == (1, 2, 2, 4)
