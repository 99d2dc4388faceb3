"""The time model against closed forms, the static plan and counts; what must grow when something
gets slower; its files and rows.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small import small_config

from pangu_locmoe.errors import ConfigError, DataError, TopologyError
from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.model.size import num_params
from pangu_locmoe.parallel.buckets import Weight
from pangu_locmoe.parallel.operation import node_bytes
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.simulate.cost import Work, step_time
from pangu_locmoe.simulate.devices import Device, load_devices
from pangu_locmoe.simulate.layout import Layout, traffic
from pangu_locmoe.simulate.model import Assumptions, simulate, work_of
from pangu_locmoe.simulate.routing import Routing, assumed_shares, trace_shares
from pangu_locmoe.simulate.rows import rows_of
from pangu_locmoe.train.step.traffic import exchanges, planned_traffic

DEVICE = Device("test", 2, 1e12, 0.5, 1e9, 1e8, intra_latency=1e-5, inter_latency=1e-4)
ROUTERS = ["hash", "switch", "locmoe"]


def cluster_config(moe=None, **parallel):
    return small_config(
        moe={"num_experts": 8, **(moe or {})},
        parallel={"expert_parallel": 4, **parallel},
        train={"batch_size": 16},
    )


def only(config, nodes=2, router="hash", device=DEVICE, **assumptions):
    return simulate(config, [nodes], [router], device, assumptions=Assumptions(**assumptions)).rows[
        0
    ]


# Sizes


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_are_those_of_all_parameters(router):
    config = cluster_config({"router": router})
    if router == "locmoe":
        work = work_of(config, router)
        assert (work.dense_bytes + 8 * work.expert_bytes) / 4 == num_params(config)
    else:  # the switch gate's parameters are in it, hash has none
        assert (
            work_of(config, router).dense_bytes + 8 * work_of(config, router).expert_bytes
        ) / 4 == num_params(config)


def test_flops_of_a_token_by_hand():
    config = small_config(
        model={
            "hidden_size": 16,
            "ffn_size": 24,
            "num_layers": 3,
            "num_moe_layers": 1,
            "seq_length": 8,
            "vocab_size": 300,
        }
    )
    work = work_of(config, "hash")
    products = (
        2 * (3 * 4 * 16 * 16 + 2 * 2 * 16 * 24) + 3 * 4 * 8 * 16
    )  # attention, two dense FFNs; scores and values
    assert (
        work.dense_flops == 3 * (products + 2 * 16 * 300)
        and work.expert_flops == 3 * 2 * 2 * 16 * 24
    )
    again = small_config(train={"recompute": True})
    assert work_of(again, "hash").expert_flops == 4 / 3 * work.expert_flops


# Closed forms


def test_one_rank_communicates_nothing():
    config = cluster_config(expert_parallel=1)
    row = only(config, nodes=1, ranks_per_node=1)
    step = row.step
    assert (
        step.exchange
        == step.reduction
        == step.tensor
        == row.moved.inter_rows
        == row.moved.intra_rows
        == 0
    )
    assert row.local_fraction == 1 and step.seconds == step.dense + step.experts + step.straggler


def test_a_step_by_hand():
    """Even hash routing on 2 nodes of 2: of a rank's rows a quarter stays, a quarter moves
    inside, half crosses.
    """
    config = cluster_config()
    row = only(config, routing={"hash": Routing(None, 1.0)})
    tokens = 4 * 8
    row_bytes = 16 * 4
    step = row.step
    assert row.moved.inter_rows == pytest.approx(
        4 * tokens / 2
    ) and row.moved.intra_rows == pytest.approx(4 * tokens / 4)
    assert step.exchange_inter == pytest.approx(
        4 * row_bytes * tokens / 1e8
    )  # 2 ranks send half of their rows
    assert step.exchange_intra == pytest.approx(4 * row_bytes * tokens / 4 / 1e9)
    assert step.exchange_latency == pytest.approx(4 * (2 * 1e-4 + 1 * 1e-5))
    assert step.straggler == pytest.approx(0) and row.max_over_mean_load == pytest.approx(1)
    work = work_of(config, "hash")
    assert step.dense == pytest.approx(tokens * work.dense_flops / 5e11)
    latency = 2 * (1e-4 + 1e-5)
    half = 2 * 1 / 2 * work.dense_bytes
    assert step.reduction == pytest.approx(half / 1e8 + half / 1e9 + latency)
    flat = only(config, routing={"hash": Routing(None, 1.0)}, reduction="flat").step
    assert flat.reduction == pytest.approx(2 * 3 / 4 * work.dense_bytes / 1e8 + latency)


@pytest.mark.parametrize("nodes, per_node, group", [(2, 2, 4), (4, 4, 2), (3, 4, 1), (4, 2, 4)])
def test_the_reduction_moves_what_the_ledger_counts(nodes, per_node, group):
    """Between nodes, and what each rank sends in all: of the dense gradients and the experts'."""
    ranks = nodes * per_node
    dense, expert = 4 * 16 * ranks, 4 * 2 * ranks
    work = Work(1.0, 1.0, 1.0, 1, 1, float(dense), float(expert))
    layout = Layout(nodes, per_node, 12, group)
    weights = [
        Weight("w", (dense // 4,), "whole"),
        Weight("e", (12 // group, expert // 4), "expert"),
    ]
    for reduction in ("flat", "hierarchical"):
        topology = Topology(ranks, per_node, group, 12, reduces_by_node=reduction == "hierarchical")
        config = small_config(model={"num_moe_layers": 0})
        counted = planned_traffic(config, topology, weights).reduction
        seconds = [
            step_time(work, layout, links, 1, np.zeros((1, nodes, 12)), 1, reduction=reduction)
            for links in (
                Device("link", per_node, 1e300, 1.0, 1e300, 1.0),
                Device("copy", per_node, 1e300, 1.0, 1e300, 1e300, copy_bandwidth=1.0),
            )
        ]
        assert nodes * seconds[0].reduction == pytest.approx(counted.inter_node_bytes)
        assert ranks * seconds[1].reduction == pytest.approx(
            counted.inter_node_bytes + counted.intra_node_bytes
        )


def test_twice_the_bandwidth_halves_the_term():
    config = cluster_config()
    slow, fast = (
        only(config, device=dataclasses.replace(DEVICE, node_bandwidth=bandwidth)).step
        for bandwidth in (1e8, 2e8)
    )
    assert fast.exchange_inter == pytest.approx(slow.exchange_inter / 2)
    assert (fast.exchange_intra, fast.exchange_latency, fast.dense) == (
        slow.exchange_intra,
        slow.exchange_latency,
        slow.dense,
    )


@pytest.mark.parametrize("nodes, ranks", [(2, 2), (4, 8), (8, 2)])
def test_messages_of_flat_and_hierarchical(nodes, ranks):
    layout = Layout(nodes, ranks, nodes * ranks, nodes * ranks)
    rows_INE = np.ones((1, nodes, nodes * ranks))
    flat, hierarchical = (
        traffic(layout, rows_INE, exchange) for exchange in ("flat", "hierarchical")
    )
    assert flat.node_messages == ranks**2 * (nodes - 1) and hierarchical.node_messages == nodes - 1
    assert flat.inter_messages == ranks * (nodes - 1) and hierarchical.inter_messages == -(
        -(nodes - 1) // ranks
    )
    assert flat.inter_rows == hierarchical.inter_rows and flat.intra_rows < hierarchical.intra_rows


def test_groupwise_carries_a_share_and_gathers_it():
    config = small_config(
        moe={"num_experts": 4}, parallel={"expert_parallel": 4}, train={"batch_size": 16}
    )
    flat, groupwise = (
        only(config, 4, tensor_parallel=4, exchange=exchange, ranks_per_node=4).step
        for exchange in ("flat", "groupwise")
    )
    assert (
        flat.exchange_inter == pytest.approx(4 * groupwise.exchange_inter)
        and groupwise.exchange_intra > flat.exchange_intra
    )
    assert flat.tensor == groupwise.tensor > 0
    rows = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"sequence_parallel": True})}
    )
    divided = only(rows, 4, tensor_parallel=4, ranks_per_node=4).step
    # Four sums a layer, and half of one in each direction for the rows of a sparse layer.
    assert divided.tensor == pytest.approx(
        flat.tensor * (1 + config.model.num_moe_layers / (4 * config.model.num_layers))
    )


def test_experts_on_few_nodes_fill_their_links():
    """With one copy on half of the nodes, the other half sends there too; repeated groups keep
    to themselves.
    """
    config = small_config(
        moe={"num_experts": 4}, parallel={"expert_parallel": 4}, train={"batch_size": 16}
    )
    repeated, single = (
        only(config, 4, copies=copies, routing={"hash": Routing(None, 1.0)})
        for copies in (True, False)
    )
    assert repeated.moved.busiest_link == pytest.approx(repeated.tokens / 8)
    assert single.moved.busiest_link == pytest.approx(
        single.tokens * 3 / 8
    )  # half of all tokens, but for its own
    assert (
        single.step.straggler == pytest.approx(single.step.experts)
        and single.expert_nodes == 2
        and single.local_fraction == pytest.approx(0.25)
    )


def test_overlap_hides_a_share_but_no_more_than_there_is_to_hide_under():
    config = cluster_config()
    plain, half, all_of_it = (
        only(config, exchange_overlap=share, reduction_overlap=share).step for share in (0, 1e-9, 1)
    )
    assert half.seconds == pytest.approx(plain.seconds) and plain.hidden_exchange == 0
    assert all_of_it.hidden_exchange == pytest.approx(
        min(plain.exchange, plain.experts + plain.straggler)
    )
    assert all_of_it.hidden_reduction == pytest.approx(
        min(plain.reduction, 2 / 3 * (plain.dense + plain.experts + plain.straggler))
    )


# Against the plan of a compiled step, and against counts


@pytest.mark.parametrize("nodes, ranks, group", [(2, 2, 4), (4, 2, 4), (2, 4, 2), (2, 4, 8)])
def test_bytes_of_static_slots_are_the_plans(nodes, ranks, group):
    config = small_config(
        moe={"num_experts": 8, "capacity": {"local_factor": 2.0, "remote_factor": 0.5}},
        parallel={"expert_parallel": group, "nodes": nodes, "sizes": "static"},
        train={"batch_size": 16, "precision": "bf16"},
    )
    topology = Topology.from_config(config, nodes * ranks)
    planned = np.zeros(2)
    for rank in range(topology.num_ranks):
        for operation in exchanges(config, topology, rank):
            planned += node_bytes(operation, topology.expert_group(rank), topology, rank)
    values = only(config, nodes, ranks_per_node=ranks).to_dict()
    assert (values["intra_node_bytes"], values["inter_node_bytes"]) == pytest.approx(tuple(planned))


def test_static_bytes_do_not_depend_on_routing_and_drops_do():
    config = cluster_config(
        {"capacity": {"local_factor": 1.0, "remote_factor": 0.5}}, sizes="static"
    )
    rows = simulate(config, [2], ROUTERS, DEVICE).rows
    assert len({row.to_dict()["inter_node_bytes"] for row in rows}) == 1
    assert rows[2].dropped_fraction == pytest.approx(
        0.4
    )  # 0.9 are local, and local slots hold half of the tokens
    assert 0.2 < rows[0].dropped_fraction < 0.35  # half are remote, and remote slots hold a quarter


def test_slots_that_follow_the_counts_hold_nearly_all():
    config = cluster_config(
        {"capacity": {"local_factor": "auto", "remote_factor": "auto"}}, sizes="static"
    )
    fixed = cluster_config(
        {"capacity": {"local_factor": 1.25, "remote_factor": 1.25}}, sizes="static"
    )
    assert only(config, router="locmoe", routing={"locmoe": Routing(0.9)}).dropped_fraction < 0.02
    assert only(fixed, router="locmoe", routing={"locmoe": Routing(0.9)}).dropped_fraction > 0.2


@pytest.mark.parametrize("seed", range(3))
def test_dropless_rows_are_a_count(seed):
    """Tokens dealt to ranks one by one, counted rank by rank."""
    generator = np.random.default_rng(seed)
    layout = Layout(2, 2, 8, 4)
    counts_RE = np.tile(generator.integers(0, 9, (2, 1, 8)), (1, 2, 1)).reshape(
        4, 8
    )  # ranks of a node are alike
    rows_INE = counts_RE.reshape(1, 2, 2, 8).sum(axis=2).astype(float)
    sent_RR = counts_RE.reshape(4, 4, 2).sum(axis=2)
    node_R = np.arange(4) // 2
    crosses_RR = node_R[:, None] != node_R
    moved = traffic(layout, rows_INE)
    assert moved.inter_rows == sent_RR[crosses_RR].sum()
    assert moved.busiest_link == max(
        (sent_RR * crosses_RR).reshape(2, 2, 4).sum(axis=(1, 2)).max(),
        (sent_RR * crosses_RR).reshape(4, 2, 2).sum(axis=(0, 2)).max(),
    )
    config = cluster_config({"capacity": {"policy": "dropless"}})
    rows = rows_of(config, layout, rows_INE)
    assert rows.computed == 2 * counts_RE.sum(axis=0).max() and rows.dropped == 0
    assert np.array_equal(rows.moved_INE, rows_INE)


def test_a_full_expert_drops_what_is_above_its_capacity():
    config = cluster_config({"capacity": {"policy": "factor", "factor": 1.25}})
    row = only(config, router="switch", routing={"switch": Routing(None, 2.0)})
    assert row.dropped_fraction == pytest.approx((2.0 - 1.25) / 8)  # one of 8 experts
    assert row.step.straggler == pytest.approx(0.25 * row.step.experts)


# What must not get better when something gets worse


FACTOR = st.floats(0.1, 10)


@settings(max_examples=40, deadline=None)
@given(
    FACTOR,
    st.sampled_from(ROUTERS),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["flat", "hierarchical"]),
)
def test_slower_links_and_processors_take_longer(factor, router, nodes, exchange):
    config = cluster_config(exchange=exchange, nodes=2)
    base = only(config, nodes, router).step
    for key in ("node_bandwidth", "intra_bandwidth", "peak_flops"):
        changed = only(
            config,
            nodes,
            router,
            dataclasses.replace(DEVICE, **{key: getattr(DEVICE, key) * factor}),
        ).step
        assert (
            (changed.seconds <= base.seconds * (1 + 1e-12))
            if factor >= 1
            else (changed.seconds >= base.seconds * (1 - 1e-12))
        )
    for key in ("intra_latency", "inter_latency"):
        assert (
            only(
                config,
                nodes,
                router,
                dataclasses.replace(DEVICE, **{key: getattr(DEVICE, key) * (1 + factor)}),
            ).step.seconds
            > base.seconds
        )


@settings(max_examples=40, deadline=None)
@given(st.floats(0.25, 1), st.floats(0.25, 1), st.floats(1, 4))
def test_more_local_tokens_never_cross_more(one, other, imbalance):
    layout = Layout(4, 2, 8, 8)
    low, high = sorted((one, other))
    shares = [assumed_shares(layout, Routing(local, imbalance)) for local in (low, high)]
    for local, share_INE in zip((low, high), shares):
        assert share_INE.sum() == pytest.approx(1) and (share_INE >= 0).all()
        assert (share_INE * layout.local_NE).sum() == pytest.approx(local)
    assert traffic(layout, shares[1]).inter_rows <= traffic(layout, shares[0]).inter_rows + 1e-12


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 8), st.floats(1, 8))
def test_an_uneven_router_computes_longer(one, other):
    config = cluster_config({"capacity": {"policy": "dropless"}})
    steps = [
        only(config, router="switch", routing={"switch": Routing(None, imbalance)}).step
        for imbalance in sorted((one, other))
    ]
    assert steps[0].straggler <= steps[1].straggler + 1e-15


# Traces


def trace_of(source_WLNE):
    source = np.asarray(source_WLNE)
    return Trace(np.arange(1, len(source) + 1), source.sum(axis=2), None, source)


def test_a_trace_of_the_same_size_is_used_as_it_is():
    source_WLNE = np.random.default_rng(1).integers(1, 50, (6, 2, 2, 8))
    layout = Layout(2, 2, 8, 4)
    share_INE, how = trace_shares(trace_of(source_WLNE), layout)
    wanted = source_WLNE[3:].reshape(-1, 2, 8) / source_WLNE[3:].reshape(-1, 2, 8).sum(
        axis=(1, 2), keepdims=True
    )
    assert how == "trace" and np.allclose(share_INE, wanted)


def test_a_trace_of_another_size_lends_its_statistics():
    """.75 local on 2 nodes is halfway between chance and all; on 4 nodes that is .625."""
    source_WLNE = np.array([[[[30, 30, 10, 10], [10, 10, 30, 30]]]] * 4)
    share_INE, how = trace_shares(trace_of(source_WLNE), layout := Layout(4, 2, 8, 8))
    assert how == "trace statistics" and (share_INE * layout.local_NE).sum() == pytest.approx(0.625)
    assert share_INE.sum(axis=1) == pytest.approx(1 / 8)


def test_whose_the_trace_is():
    config = cluster_config({"router": "switch"})
    trace = trace_of(np.ones((2, 1, 2, 8), dtype=int))
    assert [row.routed for row in simulate(config, [2], ROUTERS, DEVICE, trace).rows] == [
        "assumed",
        "trace",
        "assumed",
    ]
    assert simulate(config, [2], ["my_router"], DEVICE, trace).rows[0].routed == "trace"
    with pytest.raises(
        ConfigError, match=r"of router 'switch' \(moe.router\), which is not among hash, locmoe"
    ):
        simulate(config, [2], ["hash", "locmoe"], DEVICE, trace)
    with pytest.raises(DataError, match="no rows"):
        simulate(config, [2], ["switch"], DEVICE, trace_of(np.zeros((0, 1, 2, 8), dtype=int)))


# Input that cannot be


@pytest.mark.parametrize(
    "nodes, routers, message",
    [
        ([], ["hash"], "name at least one"),
        ([0], ["hash"], "nodes = 0: must be at least 1"),
        ([2], ["swich"], "router = 'swich'.*did you mean switch"),
        ([2], ["locmoe_plus"], "may have several of its experts"),
        ([3], ["hash"], "replicas \\(6\\) must be divisible"),
    ],
)
def test_what_cannot_be_simulated(nodes, routers, message):
    with pytest.raises((ConfigError, TopologyError), match=message):
        simulate(cluster_config(), nodes, routers, DEVICE)


@pytest.mark.parametrize(
    "assumptions, message",
    [
        ({"exchange": "hierarchic"}, "exchange = 'hierarchic'"),
        ({"exchange_overlap": 1.5}, "between 0 and 1"),
        ({"sequences": 0}, "must be above 0"),
    ],
)
def test_what_cannot_be_assumed(assumptions, message):
    with pytest.raises(ConfigError, match=message):
        Assumptions(**assumptions)
    with pytest.raises(ConfigError, match=r"imbalance 0\.5"):
        Routing(None, 0.5)
    with pytest.raises(ConfigError, match=r"local fraction 1\.1"):
        Routing(1.1, 1.0)


GOOD = (
    "d:\n  ranks_per_node: 8\n  peak_flops: 1e14\n  efficiency: 0.4\n  intra_bandwidth: 3e10\n "
    " node_bandwidth: 1e11\n"
)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            GOOD + "  inter_latecy: 1e-6\n",
            "d.inter_latecy: unknown key; did you mean inter_latency?",
        ),
        (GOOD.replace("  efficiency: 0.4\n", ""), "d.efficiency: missing"),
        (GOOD.replace("0.4", "1.4"), "d.efficiency = 1.4: must be a number above 0 and at most 1"),
        (GOOD.replace("0.4", "high"), "d.efficiency = 'high': must be"),
        (GOOD.replace(": 8", ": 8.0"), "d.ranks_per_node = 8.0: must be a whole number"),
        (GOOD.replace("1e11", "-1"), "d.node_bandwidth = -1: must be a number above 0"),
        (GOOD.replace("1e11", ".inf"), "d.node_bandwidth = inf"),
        (GOOD + "  shared_processor: 1\n", "d.shared_processor = 1: must be true or false"),
        (GOOD + "  efficiency: 0.5\n", "given twice"),
        ("d: 3\n", "d: must hold figures"),
        ("", "has no device"),
    ],
)
def test_a_device_file_that_is_wrong(tmp_path, text, message):
    path = tmp_path / "devices.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_devices(path)
    assert (
        message in str(caught.value)
        and str(path) in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_the_devices_there_are():
    assert {"ascend_910a", "ascend_910c"} <= set(load_devices())
    assert Device.named("ascend_910a").flops_per_second == pytest.approx(1.024e14)
    with pytest.raises(
        ConfigError, match=r"device 'ascend_910': must be one of .*did you mean ascend_910"
    ):
        Device.named("ascend_910")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_devices("nowhere.yaml")


# What is handed out


def test_json_has_the_rows_and_what_they_rest_on():
    simulation = simulate(cluster_config(), [2, 4], ROUTERS, DEVICE)
    values = json.loads(json.dumps(simulation.to_dict()))
    assert [(row["nodes"], row["router"]) for row in values["rows"]] == [
        (nodes, router) for nodes in (2, 4) for router in ROUTERS
    ]
    for row in values["rows"]:
        parts = (
            "dense",
            "experts",
            "straggler",
            "tensor",
            "exchange_inter",
            "exchange_intra",
            "exchange_latency",
            "reduction",
        )
        total = (
            sum(row[f"{part}_seconds"] for part in parts)
            - row["hidden_exchange_seconds"]
            - row["hidden_reduction_seconds"]
        )
        assert row["step_seconds"] == pytest.approx(total) and 0 < row["exchange_share"] < 1
        assert row["exchange_share"] == pytest.approx(
            (row["exchange_seconds"] - row["hidden_exchange_seconds"]) / row["step_seconds"]
        )
        assert {
            "local_fraction",
            "max_over_mean_load",
            "dropped_fraction",
            "ranks",
            "routing",
            "tokens_per_second",
        } <= set(row)
    assert (
        values["device"]["name"] == "test"
        and values["assumptions"]["routing"]["locmoe"]["local_fraction"] == 0.9
        and values["notes"]
    )


def test_the_table_has_a_line_for_each_row_and_says_what_is_assumed():
    lines = simulate(cluster_config(), [2], ROUTERS, DEVICE).format().splitlines()
    assert (
        lines[0].split()[:3] == ["nodes", "ranks", "router"]
        and [line.split()[2] for line in lines[1:4]] == ROUTERS
    )
    assert (
        "note: assumed of locmoe: tokens in their node 90%, fullest expert 1.3 times the mean"
        in lines
    )
    assert any(line.startswith("note: data.sharding is iid") for line in lines)


def test_a_model_without_experts_has_no_exchange():
    config = small_config(
        model={"num_layers": 3, "num_moe_layers": 0},
        parallel={"expert_parallel": 4},
        train={"batch_size": 16},
    )
    step = only(config).step
    assert step.exchange == step.experts == step.straggler == 0 < step.reduction


@pytest.mark.parametrize(
    "experts, changed, said",
    [
        (8, {}, "for example --set parallel.expert_parallel=8"),
        (
            8,
            {"train": {"recompute": True}},
            "for example --set parallel.expert_parallel=8 --set train.recompute=false",
        ),
        (
            3,
            {},
            (
                "set moe.num_experts (3) and the number of replicas (8, 16) so that a "
                "parallel.expert_parallel above 1 divides them"
            ),
        ),
    ],
)
def test_that_nothing_is_exchanged_is_said_with_what_to_set(experts, changed, said):
    def simulated(parallel, **train):
        config = small_config(
            moe={"router": "hash", "num_experts": experts},
            parallel=parallel,
            train={"batch_size": 16, **train},
        )
        return simulate(config, [4, 8], ["hash", "switch"], DEVICE)

    found = simulated({}, **changed.get("train", {}))
    (line,) = (note for note in found.to_dict()["notes"] if "nothing is exchanged" in note)
    assert line.startswith("parallel.expert_parallel is 1") and line.endswith(said)
    assert f"note: {line}" in found.format()
    if experts == 8:  # what it says works
        assert all(row.step.exchange > 0 for row in simulated({"expert_parallel": 8}).rows)


def test_micro_batches_repeat_the_messages_only():
    once, thrice = (
        only(
            small_config(
                moe={"num_experts": 8},
                parallel={"expert_parallel": 4},
                train={"batch_size": 48, "accumulation_steps": steps},
            )
        ).step
        for steps in (1, 3)
    )
    assert thrice.exchange_latency == pytest.approx(3 * once.exchange_latency)
    assert (thrice.exchange_inter, thrice.dense, thrice.reduction) == pytest.approx(
        (once.exchange_inter, once.dense, once.reduction)
    )


def test_ten_thousand_ranks_take_no_longer_to_compute_than_a_moment():
    work = Work(1e9, 1e9, 1e4, 4, 2, 1e9, 1e8)
    layout = Layout(1250, 8, 16, 16)
    share_INE = assumed_shares(layout, Routing(0.5, 1.2))
    assert (
        step_time(work, layout, DEVICE, 1024, share_INE * 1024 * layout.replicas, 2048).seconds > 0
    )


def test_mindspore_is_not_needed():
    code = (
        "import sys, pangu_locmoe.simulate.model, simulation.calibration, simulation.plots; "
        "assert 'mindspore' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2]
    )
