"""Which rank is in which node, holds which experts and works with whom."""

from __future__ import annotations

import numpy as np
import pytest
from support.small import small_config

from pangu_locmoe.errors import TopologyError
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.parallel.topology import Topology


@pytest.mark.parametrize(
    ("nodes", "experts", "wanted"),
    [(1, 3, [0, 0, 0]), (2, 4, [0, 0, 1, 1]), (4, 4, [0, 1, 2, 3]), (3, 6, [0, 0, 1, 1, 2, 2])],
)
def test_emulated_nodes_hold_contiguous_blocks_of_experts(nodes, experts, wanted):
    topology = Topology.emulated(nodes, experts)
    assert topology.num_nodes == nodes
    np.testing.assert_array_equal(topology.local_NE, np.arange(nodes)[:, None] == np.array(wanted))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            (4, 1, 4, 6),
            r"moe\.num_experts \(6\) must be divisible by parallel\.expert_parallel \(4\)",
        ),
        ((6, 4, 2, 8), r"ranks \(6\) must be divisible by ranks of a node \(4\)"),
        ((6, 2, 4, 8), r"ranks \(6\) must be divisible by parallel\.expert_parallel \(4\)"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(numbers, message):
    with pytest.raises(TopologyError, match=message):
        Topology(*numbers)


def test_eight_ranks_in_two_nodes_with_two_expert_groups():
    """Four ranks share eight experts; a group is a node, so both nodes hold all experts."""
    topology = Topology(8, 4, 4, 8)
    assert (topology.num_nodes, topology.experts_per_rank) == (2, 2)
    assert [topology.node_of_rank(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [topology.experts_of_rank(rank) for rank in (0, 3, 4, 7)] == [
        range(0, 2),
        range(6, 8),
        range(0, 2),
        range(6, 8),
    ]
    assert topology.expert_group(1) == (0, 1, 2, 3)
    assert topology.expert_group(6) == (4, 5, 6, 7)
    assert topology.same_experts(1) == topology.same_experts(5) == (1, 5)
    assert topology.local_NE.all()


def test_an_expert_group_over_two_nodes():
    topology = Topology(4, 2, 4, 4)
    np.testing.assert_array_equal(
        topology.local_NE, [[True, True, False, False], [False, False, True, True]]
    )


@pytest.mark.parametrize("numbers", [(8, 4, 4, 8), (8, 2, 4, 8), (4, 4, 1, 3), (6, 2, 3, 6)])
def test_every_group_holds_every_expert_once(numbers):
    topology = Topology(*numbers)
    for rank in range(topology.num_ranks):
        held = [
            expert
            for other in topology.expert_group(rank)
            for expert in topology.experts_of_rank(other)
        ]
        assert held == list(range(topology.num_experts))
        assert {topology.experts_of_rank(other) for other in topology.same_experts(rank)} == {
            topology.experts_of_rank(rank)
        }
        assert set(topology.expert_group(rank)) & set(topology.same_experts(rank)) == {rank}


@pytest.mark.parametrize(
    "numbers", [(8, 4, 2, 8, 2), (16, 8, 4, 8, 2), (8, 8, 2, 4, 4), (12, 6, 2, 6, 3)]
)
def test_tensor_parallel_replicas(numbers):
    """Groups of every kind divide the world; a replica is in one node; an expert-parallel group
    has one rank of each of its places.
    """
    topology = Topology(*numbers)
    ranks = range(topology.num_ranks)
    width = topology.tensor_parallel
    for group in (
        topology.tensor_group,
        topology.same_part,
        topology.expert_group,
        topology.same_experts,
    ):
        members = {rank: group(rank) for rank in ranks}
        assert all(
            rank in members[rank]
            and all(members[other] == members[rank] for other in members[rank])
            for rank in ranks
        )
    for rank in ranks:
        assert len({topology.node_of_rank(other) for other in topology.tensor_group(rank)}) == 1
        assert {topology.experts_of_rank(other) for other in topology.tensor_group(rank)} == {
            topology.experts_of_rank(rank)
        }
        assert [topology.replica_of_rank(other) for other in topology.same_part(rank)] == list(
            range(topology.num_replicas)
        )
        assert {other % width for other in topology.expert_group(rank)} == {rank % width}
        held = [
            expert
            for other in topology.expert_group(rank)
            for expert in topology.experts_of_rank(other)
        ]
        assert held == list(range(topology.num_experts))
        assert set(topology.expert_group(rank)) & set(topology.same_experts(rank)) == {rank}


def test_a_place_is_in_one_node():
    with pytest.raises(
        TopologyError,
        match=r"ranks of a node \(3\) must be divisible by parallel\.tensor_parallel \(2\)",
    ):
        Topology(6, 3, 1, 4, 2)


def test_from_config():
    assert Topology.from_config(small_config(parallel={"nodes": 2})) == Topology(2, 1, 2, 4)
    with pytest.raises(
        TopologyError, match=r"train\.batch_size \(4\) must be divisible by ranks \(8\)"
    ):
        Topology.from_config(small_config(), num_ranks=8)
    assert Topology.from_config(small_config(), num_ranks=2).ranks_per_node == 2
    assert Topology.from_config(
        small_config(parallel={"nodes": 2, "expert_parallel": 4}), num_ranks=4
    ) == Topology(4, 2, 4, 4, reduces_by_node=True)
    with pytest.raises(
        TopologyError,
        match=r"ranks \(3\) must be divisible by parallel\.nodes \(2\): .* start 4, or set parallel\.nodes to 1",
    ):
        Topology.from_config(small_config(parallel={"nodes": 2}), num_ranks=3)
    with pytest.raises(
        TopologyError,
        match=r"ranks of a node \(4 / parallel\.nodes 4 = 1\) must be divisible by parallel\.tensor_parallel \(2\), whose",
    ):
        Topology.from_config(small_config(parallel={"nodes": 4, "tensor_parallel": 2}), num_ranks=4)
    with pytest.raises(
        TopologyError, match=r"parallel\.shard_optimizer = True: there is 1 process"
    ):
        Topology.from_config(small_config(parallel={"shard_optimizer": True}))
    with pytest.raises(
        TopologyError,
        match=r"parallel\.expert_parallel = 2: there is 1 process, for which it must be 1",
    ):
        Topology.from_config(small_config(parallel={"expert_parallel": 2}))


def test_a_dense_models_domains_have_the_homes_of_the_sparse_ones():
    sparse, dense = (
        small_config(model={"num_moe_layers": layers}, parallel={"nodes": 2}) for layers in (1, 0)
    )
    assert (
        Topology.from_config(dense).home_nodes(allowed_experts(dense))
        == Topology.from_config(sparse).home_nodes(allowed_experts(sparse))
        == (0, 1)
    )


def groups(*sizes: int) -> np.ndarray:
    return np.repeat(np.eye(len(sizes), dtype=bool), sizes, axis=1)


@pytest.mark.parametrize(
    ("nodes", "allowed", "wanted"),
    [
        (4, groups(2, 2, 2, 2), (0, 1, 2, 3)),  # a group on each node
        (2, groups(2, 2, 2, 2), (0, 0, 1, 1)),  # two groups on a node
        (
            4,
            groups(4, 4),
            (0, 3),
        ),  # each group over two nodes: the first half of the domains to the first of them
        (2, groups(1, 3, 4), (0, 0, 1)),  # 1 of 4 and 3 of 4 experts on node 0
        (2, groups(5, 3), (0, 1)),  # most of the five are on node 0
        (4, np.ones((4, 8), bool), (0, 1, 2, 3)),  # one level: dealt in order
        (2, np.ones((4, 8), bool), (0, 0, 1, 1)),
        (4, np.ones((2, 8), bool), (0, 2)),
        (4, np.ones((1, 8), bool), (0,)),
    ],
)
def test_home_nodes(nodes, allowed, wanted):
    homes = Topology.emulated(nodes, allowed.shape[1]).home_nodes(allowed)
    assert homes == wanted
    held = allowed.astype(int) @ Topology.emulated(nodes, allowed.shape[1]).local_NE.T
    assert all(held[domain, home] == held[domain].max() for domain, home in enumerate(homes))


def test_local_fraction():
    topology = Topology.emulated(2, 4)
    load_NE = np.array([[3, 1, 0, 4], [2, 0, 5, 1]])
    assert topology.local_fraction(load_NE) == (3 + 1 + 5 + 1) / 16
    assert (
        topology.local_fraction(np.stack([load_NE, np.array([[1, 0, 0, 0], [0, 0, 0, 0]])]))
        == 11 / 17
    )
    assert topology.local_fraction(np.zeros((2, 4))) == 0.0
    assert topology.local_fraction(topology.local_NE * 7) == 1.0
    # Experts 0 and 2 change places: what was local of them is remote now, and the other way round.
    assert (
        topology.local_fraction(load_NE[None], np.array([[2, 1, 0, 3]]))
        == (load_NE[0, [1, 2]].sum() + load_NE[1, [0, 3]].sum()) / load_NE.sum()
    )
