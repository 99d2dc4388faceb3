"""`pangu-locmoe check`: the step of jobs of 8 to 256 ranks, compiled here, has the operators
that arithmetic asks for.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pangu_locmoe.check import check as checking
from pangu_locmoe.check.check import check
from pangu_locmoe.check.graph import host_python
from pangu_locmoe.cli import main
from pangu_locmoe.config import parse_config
from pangu_locmoe.model.size import num_params
from pangu_locmoe.simulate.devices import Device

LAYERS = 3
SPARSE = 2
HIDDEN = 32
INNER = 24
VOCAB = 300
LENGTH = 8
EXPERTS = 32


def values(ranks: int, router: str = "locmoe", **changed):
    parallel = {"expert_parallel": min(ranks, 16), "nodes": max(1, ranks // 8), "sizes": "static"}
    parallel["reduction"] = "flat"  # a sum for each weight, which is easier to count
    return {
        "model": {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "num_moe_layers": SPARSE,
            "num_heads": 2,
            "ffn_size": INNER,
            "seq_length": LENGTH,
        },
        "moe": {
            "router": router,
            "num_experts": EXPERTS,
            "levels": 1,
            "capacity": {"local_factor": 4.0, "remote_factor": 2.0},
        },
        "parallel": {**parallel, **changed},
        "train": {"steps": 20, "batch_size": 2 * ranks, "warmup_steps": 2},
    }


@pytest.mark.parametrize(
    "ranks, rank, router, precision",
    [
        (8, 3, "hash", "fp32"),
        pytest.param(64, 63, "switch", "fp16", marks=pytest.mark.slow),
        pytest.param(128, 17, "locmoe_plus", "bf16", marks=pytest.mark.slow),
        pytest.param(256, 200, "locmoe", "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_step_of_a_job(ranks, rank, router, precision):
    given = values(ranks, router)
    given["train"]["precision"] = precision
    config = parse_config(given)
    result = check(config, ranks, rank)
    assert result.differences == []
    group = min(ranks, 16)
    replicas = ranks // group

    # 16 tokens on a rank, 32 experts: ceil(4 * 16 / 32) slots for each expert of the node, ceil(2 *
    # 16 / 32) for others.
    held = EXPERTS // group
    first = (
        0 if group == 8 else rank % 16 // 8 * 8
    )  # position in the group of the node's first rank
    sent = [
        held * (2 if group == 8 or first <= position < first + 8 else 1)
        for position in range(group)
    ]
    rows = [o for o in result.operations if o.kind == "AlltoAllV"]
    assert (
        [o.direction for o in rows].count("forward")
        == [o.direction for o in rows].count("backward")
        == 2 * SPARSE
    )
    assert {o.sent for o in rows} == {tuple(sent)}
    assert {o.shape for o in rows} == {o.result for o in rows} == {(sum(sent) * HIDDEN,)}
    assert {o.dtype for o in rows} == {
        {"fp32": "Float32", "fp16": "Float16", "bf16": "BFloat16"}[precision]
    }

    statistics = [o for o in result.operations if o.kind == "AllGather"]
    assert [(o.group, o.shape, o.result) for o in statistics] == [
        ("hccl_world_group", (1, 2 * EXPERTS), (ranks, 2 * EXPERTS))
    ] * SPARSE

    sums = [o for o in result.operations if o.kind == "AllReduce"]
    over_world = [o for o in sums if o.group == "hccl_world_group"]
    of_experts = SPARSE * 2 * EXPERTS * HIDDEN * INNER
    norm_is_there = (
        group == ranks
    )  # the norm is summed over the expert-parallel group, here the world
    assert (
        sum(math.prod(o.shape) for o in over_world)
        == num_params(config) - of_experts + norm_is_there
    )
    shapes = Counter(o.shape for o in sums if o not in over_world)
    wanted = Counter() if norm_is_there else Counter({(1,): 1})
    if replicas > 1:
        wanted.update({(held, HIDDEN, INNER): SPARSE, (held, INNER, HIDDEN): SPARSE})
    assert shapes == wanted
    assert len(result.operations) == len(rows) + len(statistics) + len(sums)
    assert {
        name: len(members) for name, members in result.groups.items() if name != "hccl_world_group"
    } == (
        {}
        if norm_is_there
        else {
            f"ranks-{rank - rank % 16}-to-{rank - rank % 16 + 15}-by-1": 16,
            f"ranks-{rank % 16}-to-{ranks - 16 + rank % 16}-by-16": replicas,
        }
    )


@pytest.mark.slow
def test_divided_rows_and_moments_in_several_graphs():
    """Sequence parallelism, a sharded optimizer, fp16 and accumulation: forward and backward
    once, however many micro-batches there are.
    """
    given = values(
        16, tensor_parallel=2, expert_parallel=4, sequence_parallel=True, shard_optimizer=True
    )
    given["train"].update(precision="fp16", accumulation_steps=2)
    result = check(parse_config(given), 16, 5)
    assert result.differences == []
    replica = Counter(
        (o.kind, o.dtype)
        for o in result.operations
        if o.group == "ranks-4-to-5-by-1" and o.direction != "update"
    )
    # 3 attentions, 1 dense network: out and their gradients in; the head, the embedding. Two MoE
    # layers gather their rows and their results' gradients.
    assert (
        replica["ReduceScatter", "Float16"] == 4 + 5
        and replica["AllGather", "Float16"] == 4 + 5 + 2 * 2
    )
    assert replica["ReduceScatter", "Float32"] == replica["AllGather", "Float32"] == 1
    held = [
        o for o in result.operations if o.group == "ranks-5-to-13-by-8" and o.direction == "update"
    ]
    assert {(o.kind, o.shape, o.result) for o in held if o.kind == "ReduceScatter"} == {
        ("ReduceScatter", (HIDDEN, 8, INNER // 2), (HIDDEN // 2, 8, INNER // 2)),
        ("ReduceScatter", (INNER // 2, 8, HIDDEN), (INNER // 4, 8, HIDDEN)),
    }
    times = {
        (row["kind"], row["direction"]): row["times"]
        for row in result.rows()
        if row["kind"] == "AlltoAllV"
    }
    assert set(times.values()) == {2 * 2 * SPARSE}


@pytest.mark.parametrize(
    "changed", [{}, pytest.param({"shard_optimizer": True}, marks=pytest.mark.slow)]
)
def test_the_reduction_by_node(changed):
    """Slices, whole weights and experts, of which a node of 8 ranks has two copies."""
    given = values(16, tensor_parallel=2, expert_parallel=2, reduction=None, **changed)
    result = check(parse_config(given), 16, 5)
    assert result.differences == []
    inside = {"ranks-0-to-7-by-1": 8, "ranks-1-to-7-by-2": 4, "ranks-1-to-5-by-4": 2}
    between = "ranks-5-to-13-by-8"
    update = [o for o in result.operations if o.direction == "update" and o.shape != (1,)]
    for name, size in inside.items():
        assert len(result.groups[name]) == size
        assert any(o.kind == "ReduceScatter" and o.group == name for o in update)
    sums = "ReduceScatter" if changed else "AllReduce"
    assert any(o.kind == sums and o.group == between for o in update)
    # But for what cannot be divided nothing goes over all at once.
    assert {o.group for o in update} == {*inside, between}


@pytest.mark.slow
def test_tensor_parallel_groupwise_in_chunks_fused_and_recomputed():
    """Recomputation is in the graph, so an exchange or a sum that ran twice would differ from
    the plan.
    """
    given = values(64, tensor_parallel=2, exchange="groupwise", overlap_chunks=2)
    given["train"].update(precision="bf16", fused=True, recompute=True)
    given["model"].update(num_layers=4)
    result = check(parse_config(given), 64, 35, Device.named("ascend_910b"))
    assert result.differences == [] and result.too_large is None
    # Rank 35 is the second of its place, the second place of the second block of 16 places.
    assert {ranks for name, ranks in result.groups.items() if name != "hccl_world_group"} == {
        (34, 35),
        tuple(range(33, 64, 2)),
        tuple(range(1, 64, 2)),
        (3, 35),
    }
    sums = [
        o for o in result.operations if o.group == "ranks-34-to-35-by-1" and o.kind == "AllReduce"
    ]
    # 4 attentions, 2 dense networks and 2 MoE layers in 2 chunks, out and their gradients in; a
    # second input of the query layer, the head, the
    # embedding, two of the loss, the norm.
    assert len(sums) == 2 * (4 + 2 + 4) + 1 + 1 + 1 + 2 + 1
    sent = {
        (o.kind, o.group, o.shape, o.result)
        for o in result.operations
        if o.kind != "AllReduce" and o.group != "hccl_world_group"
    }
    # 32 tokens, 2 of 32 experts in each of 16 replicas; a node of 8 ranks is 4 replicas: 4 slots
    # for each of 8 experts, 2 for 24, half of them each, in 2 chunks.
    assert sent == {
        ("AlltoAllV", "ranks-33-to-63-by-2", (20 * HIDDEN,), (20 * HIDDEN,)),
        ("AllGather", "ranks-34-to-35-by-1", (20, HIDDEN), (40, HIDDEN)),
    }


CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "ascend"


@pytest.mark.slow
@pytest.mark.parametrize("router", ["hash", "switch", "locmoe"])
@pytest.mark.parametrize(
    "name, ranks, device",
    [
        ("small", 8, "ascend_910a"),
        ("paper_38b_64", 64, "ascend_910b"),
        ("paper_38b", 128, "ascend_910b"),
        ("paper_38b_910a", 128, "ascend_910a"),
        ("paper_38b_256", 256, "ascend_910b"),
        ("pangu_sigma", 1024, "ascend_910c"),
    ],
)
def test_shipped_jobs_compile_and_fit(name, ranks, device, router, capsys):
    for rank in (0, ranks - 1):
        flags = [
            "--ranks",
            str(ranks),
            "--rank",
            str(rank),
            "--device",
            device,
            "--set",
            f"moe.router={router}",
        ]
        assert main(["check", str(CONFIGS / f"{name}.yaml"), *flags]) == 0
        text = capsys.readouterr().out
        assert "\nfits: " in text and text.endswith("the graph is what the plan says\n")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values(8)), encoding="utf-8")
    return path


def compiled_as_planned(config, num_ranks, rank):
    """What the compilation of a job with one weight would give, without compiling."""
    weights = [{"name": "all", "shape": [num_params(config)], "kind": "whole"}]
    topology = checking.Topology.from_config(config, num_ranks)
    planned = checking.communication_plan(
        config, topology, rank, [checking.Weight("all", (num_params(config),), "whole")]
    )
    return {
        "operations": [operation.to_dict() for operation in planned],
        "groups": {operation.group: list(range(num_ranks)) for operation in planned},
        "weights": weights,
        "host_python": [],
        "flash_attention": [0, 0],
    }


def test_the_verb_prints_a_table_or_json(file, monkeypatch, capsys):
    monkeypatch.setattr(checking, "_compile", compiled_as_planned)
    assert main(["check", str(file), "--ranks", "8"]) == 0
    text = capsys.readouterr().out
    assert "rank 0 of 8 in 1 nodes" in text and text.endswith("the graph is what the plan says\n")
    assert (
        main(
            [
                "check",
                str(file),
                "--ranks",
                "8",
                "--rank",
                "7",
                "--json",
                "--set",
                "train.accumulation_steps=2",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (result["ranks"], result["rank"], result["nodes"], result["agrees"]) == (8, 7, 1, True)
    assert [(row["kind"], row["direction"], row["times"]) for row in result["operations"]] == [
        ("AlltoAllV", "forward", 8),
        ("AlltoAllV", "backward", 8),
        ("AllGather", "forward", 4),
        ("AllReduce", "update", 1),
        ("AllReduce", "update", 1),
    ]
    exchange = result["operations"][0]
    # Half of the tokens in a micro-batch: one slot for each of 32 experts, 4 of them on this rank,
    # none in another node.
    assert (exchange["bytes"], exchange["intra_node_bytes"], exchange["inter_node_bytes"]) == (
        32 * HIDDEN * 4,
        28 * HIDDEN * 4,
        0,
    )
    assert result["memory"]["weights"] * 2 == result["memory"]["moments"] and result["fits"] is None


def test_a_device_that_is_too_small_fails_with_one_line(file, monkeypatch, capsys):
    monkeypatch.setattr(checking, "_compile", compiled_as_planned)
    flags = ["check", str(file), "--ranks", "8", "--device", "ascend_910a"]
    assert main(flags) == 0
    printed = capsys.readouterr()
    assert "fits: 0.4 GB of 32.0 GB (ascend_910a)\n" in printed.out and printed.err == ""
    # More than 7e9 parameters, all of them on this rank: the stand-in does not share them out.
    large = [
        "--set",
        "model.hidden_size=5120",
        "--set",
        "model.ffn_size=20480",
        "--set",
        "train.batch_size=8",
    ]
    assert main([*flags, *large]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("pangu-locmoe: does not fit: ") and printed.err.endswith(
        " GB of 32.0 GB (ascend_910a, rank 0)\n"
    )
    assert printed.err.count("\n") == 1 and "fits: " not in printed.out
    assert main([*flags, "--json", *large]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (
        result["fits"] is False
        and result["device"]["memory_bytes"] == 32e9
        and result["memory"]["total"] > 32e9
    )


def test_a_graph_that_is_not_the_plan_fails_with_one_line(file, monkeypatch, capsys):
    def one_less(config, num_ranks, rank):
        result = compiled_as_planned(config, num_ranks, rank)
        del result["operations"][0]
        return result

    monkeypatch.setattr(checking, "_compile", one_less)
    assert main(["check", str(file), "--ranks", "8"]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert (
        "AlltoAllV on hccl_world_group" in printed.err
        and "8 in the plan, 7 in the graph" in printed.err
    )


def test_python_on_the_host_fails_with_one_line(file, monkeypatch, capsys):
    def with_a_dict(config, num_ranks, rank):
        result = compiled_as_planned(config, num_ranks, rank)
        return {**result, "host_python": ["dict(zip(keys, values),)"]}

    monkeypatch.setattr(checking, "_compile", with_a_dict)
    assert main(["check", str(file), "--ranks", "8"]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "PyExecute, Python on the host in the middle of the graph: dict(zip" in printed.err


def test_python_in_the_text_of_a_graph():
    """As MindSpore writes what makes a dict that leaves a graph."""
    lines = (
        '  %1(CNode_6) = PyExecute("dict(zip(k,v),)", ("k", "v"), %0) primitive_attrs: {}',
        "      : (<String, NoShape>) -> (<Any(Tensor)[Float64], (-2)>)",
        "  %2(CNode_7) = PrimFunc_Add(%0, %0) cnode_attrs: {}",
        "#   1: @1_construct:CNode_6{[0]: ValueNode<Primitive> PyExecute}",
    )
    assert host_python("\n".join(lines)) == ["dict(zip(k,v),)"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ranks", "1"], "--ranks 1: must be at least 2"),
        (["--ranks", "12"], "ranks (12) must be divisible by parallel.expert_parallel (8)"),
        (
            ["--ranks", "8", "--set", "parallel.nodes=16"],
            "ranks (8) must be divisible by parallel.nodes (16)",
        ),
        (["--ranks", "8", "--rank", "8"], "--rank 8: must be between 0 and 7"),
        (
            ["--ranks", "8", "--set", "parallel.sizes=counts", "--set", "moe.capacity={}"],
            "parallel.sizes = 'counts'",
        ),
        (["--ranks", "8", "--device", "ascend_910d"], "device 'ascend_910d': must be one of"),
        (
            ["--ranks", "8", "--device", "emulated_cpu"],
            "--device emulated_cpu: its memory_bytes is not known",
        ),
        (
            ["--ranks", "8", "--set", "train.fused=true"],
            "train.fused = True: flash attention takes fp16 and bf16 only",
        ),
        (
            [
                "--ranks",
                "8",
                "--device",
                "ascend_910a",
                "--set",
                "train.fused=true",
                "--set",
                "train.precision=bf16",
            ],
            "train.fused = True: ascend_910a has no flash attention for training; must be false",
        ),
        (
            ["--ranks", "8", "--set", "parallel.expert_parallel=16", "--set", "moe.num_experts=16"],
            "ranks (8) must be divisible by parallel.expert_parallel (16)",
        ),
    ],
)
def test_refusals(file, capsys, flags, message):
    assert main(["check", str(file), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_step_that_does_not_compile_is_one_line(file, monkeypatch, capsys):
    monkeypatch.setattr(checking.sys, "executable", "/bin/false")
    assert main(["check", str(file), "--ranks", "8"]) == 2
    assert capsys.readouterr().err == "pangu-locmoe: the step does not compile: exit code 1\n"


def test_a_deep_stack_is_compiled_with_fewer_layers_and_said_so(monkeypatch):
    given = values(8, "switch")
    given["model"].update(num_layers=20, num_moe_layers=5)
    compiled = []

    def record(config, num_ranks, rank):
        compiled.append(config.model)
        names = ["blocks.0.w", "blocks.2.moe.experts.w", "query_layer.w", "word_table"]
        topology = checking.Topology.from_config(config, num_ranks)
        weights = [
            checking.Weight(name, (index + 1, 3), "expert" if "experts" in name else "whole")
            for index, name in enumerate(names)
        ]
        planned = checking.communication_plan(config, topology, rank, weights)
        return {
            "operations": [operation.to_dict() for operation in planned],
            "groups": {operation.group: list(range(num_ranks)) for operation in planned},
            "weights": [
                {"name": weight.name, "shape": list(weight.shape), "kind": weight.kind}
                for weight in weights
            ],
            "flash_attention": [0, 0],
            "host_python": [],
        }

    monkeypatch.setattr(checking, "_compile", record)
    result = check(parse_config(given), 8)
    assert [(model.num_layers, model.num_moe_layers) for model in compiled] == [(5, 2)]
    assert any(
        note.startswith("compiled with 5 of 20 layers, 2 of 5 sparse ones") for note in result.notes
    )
    names = [weight.name for weight in result.weights]
    assert (
        names.count("word_table"),
        len([n for n in names if n.endswith(".moe.experts.w")]),
        len(names),
    ) == (1, 5, 2 + 19)
    assert sum(o.kind == "AlltoAllV" for o in result.operations) == 5 * 4
    # The stand-in's weights are not the configuration's, which is found.
    assert len(result.differences) == 1 and "hold" in result.differences[0]
