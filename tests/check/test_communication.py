"""The plan in numbers, the reading of a graph, and what a difference looks like."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from support.small import small_config

from pangu_locmoe.check.communication import (
    Weight,
    buffer_megabytes,
    communication_plan,
    differences,
)
from pangu_locmoe.check.graph import communication
from pangu_locmoe.config import CapacityConfig, load_config
from pangu_locmoe.moe.slot_sizes import certain_drops, group_slots
from pangu_locmoe.parallel.exchange import Traffic
from pangu_locmoe.parallel.operation import Operation, node_bytes
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.step.graph import refuse_graph
from pangu_locmoe.train.step.traffic import planned_traffic

WEIGHTS = [
    Weight("word_table", (300, 16), "whole"),
    Weight("blocks.1.moe.experts.w_in", (2, 16, 24), "expert"),
]

GRAPH = """
subgraph @f() {
  %3(flat) = AlltoAllV(%2, (I64(4), I64(2)), (I64(3), I64(3))) {instance name: exchange} primitive_attrs: {group: "g", block_size: I64(16)} cnode_attrs: {checkpoint: Bool(1)}
      : (<Tensor[BFloat16], (96)>, <Tuple[Int64*2], TupleShape(NoShape, NoShape)>, <Tuple[Int64*2], TupleShape(NoShape, NoShape)>) -> (<Tensor[BFloat16], (96)>)
      # Scope: (Default)
  %4(dx) = AlltoAllV(%3, (I64(3), I64(3)), (I64(4), I64(2))) {instance name: exchange} primitive_attrs: {group: "g", block_size: I64(16)}
      : (<Tensor[BFloat16], (96)>, <Tuple[Int64*2]>, <Tuple[Int64*2]>) -> (<Tensor[BFloat16], (96)>)
      : (S:[96], <null>, <null>) -> (S:[96])
      # Scope: (Gradients/Default/Grad_AlltoAllV)
  %5(a) = PrimFunc_Add(%4, %4)
      : (<Tensor[Float32], (96)>, <Tensor[Float32], (96)>) -> (<Tensor[Float32], (96)>)
  %6(b) = AllReduce(%5) {instance name: sum} primitive_attrs: {group: "hccl_world_group", fusion: I64(0), op: "sum"}
      : (<Tensor[Float32], (5, 7)>) -> (<Tensor[Float32], (5, 7)>)
      # Scope: (Default/over_world-SumOver)
  %7(c) = ReduceScatter(%6) {instance name: r} primitive_attrs: {rank_size: I64(5), group: "g"}
      : (<Tensor[Float32], (5, 7)>) -> (<Tensor[Float32], (1, 7)>)
"""


def test_operators_of_a_graph():
    assert communication(GRAPH) == [
        Operation("AlltoAllV", "g", "", "BFloat16", (96,), (96,), (4, 2)),
        Operation("AlltoAllV", "g", "", "BFloat16", (96,), (96,), (3, 3)),
        Operation("AllReduce", "hccl_world_group", "", "Float32", (5, 7), (5, 7)),
        Operation("ReduceScatter", "g", "", "Float32", (5, 7), (1, 7)),
    ]


def test_an_operator_without_shapes_is_not_passed_over():
    with pytest.raises(ValueError, match="no shapes for AllReduce"):
        communication(
            '  %6(b) = AllReduce(%5) {instance name: sum} primitive_attrs: {group: "g"}\n  '
            "    # Scope: (Default)"
        )


def static_config(**parallel):
    return small_config(
        moe={"num_experts": 8, "capacity": {"local_factor": 2.0, "remote_factor": 0.5}},
        parallel={"expert_parallel": 4, "nodes": 4, "sizes": "static", **parallel},
        train={"batch_size": 16, "precision": "bf16"},
    )


def test_the_plan_in_numbers():
    """8 ranks in 4 nodes, 16 tokens each; 2 experts on each rank: 4 slots for each local one, 1
    for each remote one.
    """
    operations = communication_plan(static_config(), Topology(8, 2, 4, 8), 3, WEIGHTS)
    rows = Operation(
        "AlltoAllV",
        "ranks-0-to-3-by-1",
        "forward",
        "BFloat16",
        (20 * 16,),
        (20 * 16,),
        (2, 2, 8, 8),
    )
    assert operations == [
        *[rows] * 2,
        *[dataclasses.replace(rows, direction="backward")] * 2,
        Operation("AllGather", "hccl_world_group", "forward", "Float32", (1, 16), (8, 16)),
        Operation("AllReduce", "hccl_world_group", "update", "Float32", (300, 16), (300, 16)),
        Operation("AllReduce", "ranks-3-to-7-by-4", "update", "Float32", (2, 16, 24), (2, 16, 24)),
        Operation("AllReduce", "ranks-0-to-3-by-1", "update", "Float32", (1,), (1,)),
    ]
    assert rows.bytes == 20 * 16 * 2
    assert node_bytes(rows, (0, 1, 2, 3), Topology(8, 2, 4, 8), 3) == (8 * 16 * 2, 4 * 16 * 2)


def test_tensor_parallelism_in_numbers():
    """8 ranks, 4 replicas of 2 in 2 nodes: 32 tokens on each, two experts, 8 slots for each local
    one and 2 for each remote one.
    """
    config = static_config(tensor_parallel=2, nodes=2, exchange="groupwise")
    weights = [
        Weight("word_table", (150, 16), "slice"),
        Weight("norm.gamma", (16,), "whole"),
        WEIGHTS[1],
    ]
    found = communication_plan(config, Topology(8, 4, 4, 8, 2), 3, weights)

    def one(kind, group, direction, dtype, shape, result=None, sent=()):
        return Operation(kind, group, direction, dtype, shape, result or shape, sent)

    peers = "ranks-1-to-7-by-2"
    replica = "ranks-2-to-3-by-1"
    exchange = [
        one("AlltoAllV", peers, "", "BFloat16", (20 * 16,), None, (8, 8, 2, 2)),
        one("AllGather", replica, "", "BFloat16", (20, 16), (40, 16)),
    ]
    wanted = [
        dataclasses.replace(o, direction=direction)
        for direction in ("forward", "backward")
        for o in exchange * 2
    ]
    wanted += [
        one("AllReduce", replica, "forward", "Float32", shape)
        for shape in [(32, 16), (2, 32), (2, 32)]
    ]  # embedding, the loss twice
    wanted += [one("AllReduce", replica, "forward", "BFloat16", (32, 16))] * 5 + [
        one("AllReduce", replica, "forward", "BFloat16", (2, 20, 16))
    ]
    wanted += [one("AllReduce", replica, "backward", "BFloat16", (32, 16))] * 7
    wanted += [one("AllReduce", replica, "backward", "BFloat16", (2, 20, 16))]
    wanted += [one("AllGather", "hccl_world_group", "forward", "Float32", (1, 16), (8, 16))]
    wanted += [
        one("AllReduce", peers, "update", "Float32", (150, 16)),
        one("AllReduce", "hccl_world_group", "update", "Float32", (16,)),
    ]
    wanted += [one("AllReduce", group, "update", "Float32", (1,)) for group in (peers, replica)]
    assert Counter(found) == Counter(wanted)  # experts are on one replica only: not reduced


def test_groupwise_sends_every_row_between_nodes_once():
    flat, groupwise = (
        planned_traffic(
            static_config(tensor_parallel=2, nodes=2, exchange=exchange), Topology(8, 4, 4, 8, 2)
        )
        for exchange in ("flat", "groupwise")
    )
    assert groupwise.inter_node_bytes * 2 == flat.inter_node_bytes > 0
    # In each direction: half of what went inside the node, and each rank's 20 rows to the other of
    # its place.
    assert groupwise.intra_node_bytes == flat.intra_node_bytes // 2 + 4 * 8 * 20 * 16 * 2


def test_slots_can_be_shared_out_over_a_replica():
    """1.25 * 100 / 8 are 16 slots: 18 over three ranks.

    A source has at most a slot for every token.
    """
    capacity = CapacityConfig(local_factor=1.25, remote_factor=1.25)
    for ranks, tokens, slots in ((1, 100, 16), (3, 100, 18), (3, 12, 3), (8, 4, 4)):
        assert set(
            group_slots(capacity, Topology(2 * ranks, ranks, 2, 8, ranks), 0, tokens).reshape(-1)
        ) == {slots}


def test_experts_that_only_one_rank_holds_are_not_reduced():
    operations = communication_plan(static_config(), Topology(4, 2, 4, 8), 0, WEIGHTS)
    assert [o.shape for o in operations if o.kind == "AllReduce"] == [(300, 16), (1,)]


def test_differences_have_a_line_each():
    operations = communication_plan(static_config(), Topology(8, 2, 4, 8), 3, WEIGHTS)
    assert differences(operations, operations[::-1]) == []
    strange = Operation("ReduceScatter", "g", "forward", "Float32", (5, 7), (1, 7))
    assert differences(operations, [*operations[:-1], strange]) == [
        "AllReduce on ranks-0-to-3-by-1, Float32 [1] -> [1]: 1 in the plan, 0 in the graph",
        "ReduceScatter on g, Float32 [5, 7] -> [1, 7]: 0 in the plan, 1 in the graph",
    ]


def test_buffers_are_as_large_as_the_largest_message():
    assert buffer_megabytes(static_config(), 8) == 200  # HCCL's default
    # 16 sequences of 8,192 tokens on 8 ranks: 16,384 tokens in 20,480 slots of 8,192 numbers of 2
    # bytes
    large = small_config(
        model={"seq_length": 8192, "hidden_size": 8192},
        moe={"num_experts": 8, "capacity": {"local_factor": 2.0, "remote_factor": 0.5}},
        parallel={"expert_parallel": 4, "nodes": 4, "sizes": "static"},
        train={"batch_size": 16, "precision": "bf16"},
    )
    assert buffer_megabytes(large, 8) == 320


def test_pieces_of_gradients_are_scattered_and_of_weights_gathered():
    """Eight ranks hold the words, whose 300 rows they cannot divide but their 16 features; two
    hold the same experts.
    """
    found = Counter(
        operation
        for operation in communication_plan(
            static_config(shard_optimizer=True), Topology(8, 2, 4, 8), 5, WEIGHTS
        )
        if operation.direction == "update"
    )
    world = "hccl_world_group"
    replicas = "ranks-1-to-5-by-4"
    group = "ranks-4-to-7-by-1"
    assert found == Counter(
        [
            Operation("ReduceScatter", world, "update", "Float32", (16, 300), (2, 300)),
            Operation("AllGather", world, "update", "Float32", (2, 300), (16, 300)),
            Operation("ReduceScatter", replicas, "update", "Float32", (16, 2, 24), (8, 2, 24)),
            Operation("AllGather", replicas, "update", "Float32", (8, 2, 24), (16, 2, 24)),
            Operation("AllReduce", group, "update", "Float32", (1,), (1,)),
            Operation("AllReduce", world, "update", "Float32", (1,), (1,)),
        ]
    )


def test_traffic_of_one_graph_is_known_without_looking():
    ledger = planned_traffic(static_config(), Topology(8, 2, 4, 8))
    # Each of 8 ranks, 4 times: 8 rows of 32 bytes to its neighbour, 2 to each of 2 others.
    assert (ledger.intra_node_bytes, ledger.inter_node_bytes) == (8 * 4 * 8 * 32, 8 * 4 * 4 * 32)
    assert (ledger.intra_node_messages, ledger.inter_node_messages) == (8 * 4, 8 * 4 * 2)


def test_traffic_counts_every_micro_batch():
    config = static_config()
    topology = Topology(8, 2, 4, 8)
    more = config.train.model_copy(update={"accumulation_steps": 2, "batch_size": 32})
    one = planned_traffic(config, topology)
    two = planned_traffic(config.model_copy(update={"train": more}), topology)
    assert one.reduction == two.reduction == Traffic()
    assert (two.intra_node_bytes, two.inter_node_bytes) == (
        2 * one.intra_node_bytes,
        2 * one.inter_node_bytes,
    )
    assert (two.intra_node_messages, two.inter_node_messages) == (
        2 * one.intra_node_messages,
        2 * one.inter_node_messages,
    )


@pytest.mark.parametrize(
    "name, ranks",
    [
        ("small", 8),
        ("paper_38b_64", 64),
        ("paper_38b", 128),
        ("paper_38b_256", 256),
        ("pangu_sigma", 1024),
    ],
)
@pytest.mark.parametrize("router", ["hash", "switch", "locmoe"])
def test_shipped_jobs_fit_their_clusters(name, ranks, router):
    config = load_config(
        Path(__file__).resolve().parents[2] / "configs" / "ascend" / f"{name}.yaml",
        [f"moe.router={router}"],
    )
    topology = Topology.from_config(config, ranks)
    refuse_graph(config)
    tokens = config.micro_batch * config.model.seq_length // topology.num_replicas
    if (
        name != "pangu_sigma"
    ):  # a replica holds 5 of 640 experts, and no capacity there would hold all of its tokens
        assert not list(certain_drops(config, topology, ranks - 1, tokens))
    slots_RE = group_slots(config.moe.capacity, topology, 0, tokens)
    assert not (slots_RE % topology.tensor_parallel).any()
