"""The memory of a rank: exact where parameters are counted, and against sums by hand where it is
estimated.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small import small_config

from pangu_locmoe.check.communication import Weight
from pangu_locmoe.check.memory import estimate
from pangu_locmoe.config.models import ParallelConfig
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.gradients import kind, pieces
from pangu_locmoe.parallel.hccl import HcclOperators
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.optimizer import AdamW
from pangu_locmoe.train.step.cells import gradient_buffers, reduced_buffers

WEIGHTS = [
    Weight("word_table", (300, 32), "whole"),
    Weight("position_table", (8, 32), "whole"),
    Weight("norm1.gamma", (32,), "whole"),
]


def config_of(sequences: int = 2, **changed):
    """Two ranks of one node, each with two of four experts and `sequences` sequences of 8 tokens.

    D 32, F 24, two heads.
    """
    train = {"precision": "bf16", "batch_size": 2 * sequences, **changed.pop("train", {})}
    moe = {"router": "hash", "capacity": {"local_factor": 1.25, "remote_factor": 1.25}}
    return small_config(
        model={"hidden_size": 32, "num_layers": 4, **changed.pop("model", {})},
        moe=moe,
        parallel={"expert_parallel": 2, "sizes": "static"},
        train=train,
    )


def memory(config, weights=WEIGHTS, groups: int = 1):
    return estimate(config, Topology.from_config(config, 2), 0, weights, groups)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize(
    "train",
    [{}, {"accumulation_steps": 2, "batch_size": 8}, {"offload_expert_optimizer": True}],
    ids=["plain", "buffers", "offloaded"],
)
def test_weights_and_optimizer_are_those_of_the_built_model(shard, train):
    config = config_of(train={"precision": "fp32", **train})
    config = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"shard_optimizer": shard})}
    )
    topology = Topology.from_config(config, 2)
    exchange = Exchange(HcclOperators(1, 2, lambda name, ranks: None), [0, 1], [0, 0], False)
    model = PanguSigma(config, None, topology, exchange)
    parameters = model.trainable_params()
    optimizer = AdamW.of(
        parameters, config.train, pieces(parameters, topology, 1) if shard else None
    )
    found = estimate(
        config, topology, 1, [Weight(p.name, tuple(p.shape), kind(p)) for p in parameters], 1
    )
    size = sum(p.nbytes for p in parameters)
    own = sum(p.nbytes for p in optimizer.updated if p.name.startswith("piece."))
    assert (own > 0) == shard and found.weights == size + own
    held = [*gradient_buffers(parameters)]
    held += [
        p
        for p in reduced_buffers(optimizer, gradient_buffers(parameters))
        if p.name.startswith("reduced.")
    ]
    assert found.gradients == size
    assert found.accumulated == sum(p.nbytes for p in held) * ("accumulation_steps" in train)
    state = [*zip(optimizer.state, 2 * optimizer.on_host)]
    assert found.moments == sum(p.nbytes for p, on_host in state if not on_host)
    assert found.on_host == sum(p.nbytes for p, on_host in state if on_host)
    assert (found.on_host > 0) == ("offload_expert_optimizer" in train) and found.copies == 0


def test_activations_by_hand():
    """16 tokens of 32 features; 5 slots of each of 2 sources for each of 2 local experts: 20
    rows.
    """
    norm = 16 * 32 * 4 + 2 * 16 * 4  # 2176: in fp32, the mean, and one over the deviation
    half_rows = 16 * 32 * 2  # 1024: [T, D] in bf16
    scores = 2 * 2 * 8 * 8  # B H S S
    attention = (
        norm + half_rows + 3 * half_rows + 2 * scores + 3 * half_rows
    )  # the mixed values in fp32, and once in bf16
    dense = attention + norm + half_rows + 16 * 24 * (2 + 2)
    router = 16 * 32 * 4 + 4 * 16 * 4 * 4 + 2 * half_rows
    sparse = attention + norm + router + 20 * 32 * 2 + 20 * 24 * (2 + 2)
    found = memory(config_of(), groups=3)
    assert found.activations == {
        "mask": 4 * scores,
        "dense blocks": 2 * dense,
        "sparse blocks": sparse,
        "query layer": dense + half_rows + norm,
        "head": half_rows + 16 * 300 * 4,
    }
    assert (
        found.copies == 2 * 300 * 32
    )  # rows of the position table are rounded only when they are taken, and norms never
    assert found.workspace == 16 * 300 * (4 + 2)  # the logits' gradient, fp32 and bf16
    assert found.buffers == 3 * 2 * 200 * 2**20
    kept = sum(found.activations.values()) + found.copies + found.workspace
    assert found.moments_of_step == {
        "forward": kept + 4 * 300 * 32,  # with the word table's gradient
        "gradient of the first block": found.copies
        + found.workspace
        + 4 * scores
        + max(dense, sparse)
        + found.gradients,
        "update": found.gradients * 3 // 2,
    }
    lasting = found.weights + found.moments + found.buffers
    assert found.total == lasting + max(found.moments_of_step.values()) == found.to_dict()["total"]

    fused = memory(config_of(train={"fused": True}))
    assert fused.activations["mask"] == 2 * 8 * 8  # a byte, shared by the heads
    flash = 2 * 2 * 8 * 8 * 4 * 2  # maximum and sum, fp32 [B, H, S, 8], for the probabilities
    assert fused.activations["dense blocks"] == 2 * (dense + flash - 2 * scores - half_rows)

    again = memory(config_of(train={"recompute": True}))
    assert again.activations["dense blocks"] == 2 * 2 * half_rows
    assert again.activations["sparse blocks"] == 2 * half_rows + router + 20 * 32 * 2
    assert again.activations["query layer"] == found.activations["query layer"]
    assert again.workspace == found.workspace
    blocks = again.activations["dense blocks"] + again.activations["sparse blocks"]
    assert again.moments_of_step["gradient of the last block"] == (
        again.copies
        + again.workspace
        + again.activations["mask"]
        + blocks
        + max(dense, sparse)
        + 4 * 300 * 32
    )

    exact = memory(config_of(train={"precision": "fp32"}))
    assert exact.copies == 0
    assert (
        exact.activations["query layer"]
        == 3 * norm + 9 * 2 * half_rows - 2 * half_rows + 4 * scores + 2 * 16 * 24 * 4
    )
    plain = memory(config_of(model={"final_norm": False}))
    assert plain.activations["query layer"] == found.activations["query layer"] - norm
    dropped = memory(config_of(model={"dropout": 0.1}))
    assert dropped.activations["query layer"] == found.activations["query layer"] + 2 * half_rows


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.booleans(), st.booleans())
def test_what_must_hold_of_any_size(sequences, fused, recompute):
    train = {"fused": fused, "recompute": recompute}
    one, two = (memory(config_of(sequences * times, train=train)) for times in (1, 2))
    for part in ("mask", "dense blocks", "query layer", "head"):
        assert two.activations[part] == 2 * one.activations[part]
    plain = memory(config_of(sequences))
    if recompute:
        assert one.activations["dense blocks"] < plain.activations["dense blocks"]
        assert one.activations["sparse blocks"] < plain.activations["sparse blocks"]
    assert (one.weights, one.moments, one.copies) == (plain.weights, plain.moments, plain.copies)


def test_tensor_parallelism_divides_what_it_divides():
    """Four ranks are two replicas: as many tokens for each as on two ranks, half of the heads, F
    and V.
    """
    whole = config_of()
    split = whole.model_copy(
        update={"parallel": ParallelConfig(expert_parallel=2, tensor_parallel=2, sizes="static")}
    )
    one = memory(whole)
    half = estimate(split, Topology.from_config(split, 4), 0, WEIGHTS, 1)
    rows = 16 * 32 * 2
    assert half.activations["mask"] * 2 == one.activations["mask"]
    assert (half.activations["head"] - rows) * 2 == one.activations["head"] - rows
    whole_parts = (
        3 * (16 * 32 + 2 * 16) * 4 + 3 * rows
    )  # the norms, and [T, D]s: two operands of attention, one of the network
    assert (half.activations["query layer"] - whole_parts) * 2 == one.activations[
        "query layer"
    ] - whole_parts

    rows = split.model_copy(
        update={"parallel": split.parallel.model_copy(update={"sequence_parallel": True})}
    )
    divided = estimate(rows, Topology.from_config(rows, 4), 0, WEIGHTS, 1)
    assert (
        half.activations["dense blocks"] - divided.activations["dense blocks"]
        == 2 * 2 * (16 * 32 + 2 * 16) * 4 // 2
    )  # half of two norms of two blocks


def test_its_lines_add_up():
    found = memory(config_of())
    lines = found.format("bf16")
    assert (
        len(lines) == 2
        and f"at most at once {found.total / 1e9:.2f}" in lines[1]
        and "weights in bf16 0.00" in lines[1]
    )
    assert lines[1].startswith("estimated, GB: ")


@pytest.mark.parametrize("size", [8, 1040])
def test_heads_that_flash_attention_does_not_take(size):
    with pytest.raises(
        Exception,
        match=(
            "heads of a multiple of 16 up to 512 features: model.hidden_size / "
            f"model.num_heads is {size}"
        ),
    ):
        config_of(model={"hidden_size": 2 * size}, train={"fused": True})
