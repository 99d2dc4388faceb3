"""Gradients in buckets, added up by node: every layout against the plain sum.

Ranks are threads, of which one at a time runs between two exchanges.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from mindspore import Parameter, Tensor, ops
from support.small import small_config

from pangu_locmoe.errors import ConfigError
from pangu_locmoe.parallel import buckets as module
from pangu_locmoe.parallel.buckets import GatherPieces, SumGradients, Weight, buckets
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.gradients import holders, piece
from pangu_locmoe.parallel.operation import Operation, node_bytes
from pangu_locmoe.parallel.tensor import Cut
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.step.traffic import planned_traffic

TIMEOUT = 60  # seconds


class Meeting:
    """Where `size` ranks exchange; one of them runs at a time."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.running = threading.Lock()
        self.parts = {}

    def wait(self):
        self.running.release()
        self.barrier.wait(TIMEOUT)
        self.running.acquire()


class Threads(SingleProcess):
    """A rank that is a thread; all ranks of the world exchange at the same time."""

    def __init__(self, rank, size, meeting):
        self.rank = rank
        self.size = size
        self.meeting = meeting

    def all_to_all(self, rows_MD, sent, received, ranks):
        rows = rows_MD.asnumpy()
        parts = np.split(rows, np.cumsum(sent)[:-1])
        self.meeting.parts.update({(self.rank, to): part for to, part in zip(ranks, parts)})
        self.meeting.wait()
        arrived = [self.meeting.parts[source, self.rank] for source in ranks]
        assert [len(part) for part in arrived] == list(received)
        self.meeting.wait()
        return Tensor(np.concatenate(arrived))

    def all_reduce(self, x, ranks):
        """In the same order on all ranks, as a ring does it."""
        everyones = self.gather_rows(ops.expand_dims(x, 0), ranks).asnumpy()
        return Tensor(np.add.reduce(everyones, axis=0))


def on_ranks(size, function):
    """function(communicator) of every rank."""
    meeting = Meeting(size)

    def run(rank):
        with meeting.running:
            return function(Threads(rank, size, meeting))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


TOPOLOGIES = {
    "two nodes of two": (4, 2, 4, 4, 1),
    "experts in every node": (8, 4, 2, 4, 1),
    "data parallel, three nodes": (6, 2, 1, 4, 1),
    "tensor parallel": (8, 4, 2, 4, 2),
    "tensor and data parallel": (8, 4, 1, 4, 2),
    "holders unevenly in nodes": (12, 4, 3, 6, 1),
    "one node": (4, 4, 2, 4, 1),
    "one rank in a node": (2, 1, 1, 4, 1),
}
SHAPES = {
    "word_table": (12, 3),
    "norm.gamma": (5,),
    "blocks.0.w": (7, 24),
    "blocks.1.moe.experts.w_in": (1, 5, 12),
    "blocks.1.moe.experts.w_out": (1, 12, 5),
    "query": (3,),
}


def parameters_of(topology):
    """With tensor parallelism the matrix is a slice."""
    parameters = [Parameter(Tensor(np.zeros(s, np.float32)), name=n) for n, s in SHAPES.items()]
    if topology.tensor_parallel > 1:
        parameters[2].cut = Cut(1)
    return parameters


def gradients_of(rank):
    random = np.random.default_rng(rank)
    return [random.normal(size=shape).astype(np.float32) for shape in SHAPES.values()]


def run(topology, sharded):
    """For every rank: the sums it gets, and parameters whose pieces are 10 * what it got."""

    def one(communicator):
        parameters = parameters_of(topology)
        own = [
            piece(p.shape, Weight.of(p).kind, topology, communicator.rank) if sharded else None
            for p in parameters
        ]
        shared = (parameters, own, topology, communicator, False)
        sums = SumGradients(*shared)(tuple(map(Tensor, gradients_of(communicator.rank))))
        whole = GatherPieces(*shared)(tuple(each * 10 for each in sums))
        return [[each.asnumpy() for each in kind] for kind in (sums, whole)], own

    return on_ranks(topology.num_ranks, one)


@pytest.mark.parametrize("limit", [None, 0, 2**20], ids=["flat", "apart", "joined"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("numbers", TOPOLOGIES.values(), ids=list(TOPOLOGIES))
def test_sums_of_all_that_hold_the_same(numbers, sharded, limit, monkeypatch):
    """Whatever is joined with what, and the same bit by bit on all of them."""
    monkeypatch.setattr(module, "BUCKET_BYTES", limit or 0)
    topology = Topology(*numbers, reduces_by_node=limit is not None)
    found = run(topology, sharded)
    for rank, ((sums, whole), own) in enumerate(found):
        for index, parameter in enumerate(parameters_of(topology)):
            ranks = holders(parameter, topology, rank)
            wanted = np.sum([gradients_of(r)[index].astype(np.float64) for r in ranks], axis=0)
            part = wanted if own[index] is None else own[index].of(wanted)
            np.testing.assert_allclose(sums[index], part, rtol=0, atol=1e-5)
            np.testing.assert_allclose(whole[index], 10 * wanted, rtol=0, atol=1e-4)
            first = found[ranks[0]][0]
            np.testing.assert_array_equal(whole[index], first[1][index])
            if own[index] is None:
                np.testing.assert_array_equal(sums[index], first[0][index])


def weights_of(topology):
    return [Weight.of(parameter) for parameter in parameters_of(topology)]


def test_buckets_are_bounded_and_hold_everything_once(monkeypatch):
    topology = Topology(8, 4, 2, 4, reduces_by_node=True)
    weights = weights_of(topology)
    for limit in (0, 200, 500, 10_000):
        monkeypatch.setattr(module, "BUCKET_BYTES", limit)
        found = buckets(weights, [None] * len(weights), topology, 3)
        assert Counter(i for bucket in found for i in bucket.members) == Counter(range(6))
        for bucket in found:
            size = 4 * sum(map(math.prod, bucket.shapes))
            assert size <= limit or len(bucket.members) == 1
            assert len({weights[index].kind for index in bucket.members}) == 1
    assert [bucket.members for bucket in found] == [(0, 1, 2, 5), (3, 4)]


def test_flat_is_one_sum_for_each():
    topology = Topology(8, 4, 2, 4)
    found = buckets(weights_of(topology), [None] * 6, topology, 3)
    assert all(bucket.is_alone for bucket in found) and len(found) == 6


@pytest.mark.parametrize(
    "reduction, nodes, ranks, by_node",
    [
        (None, 1, 1, False),
        (None, 2, 1, False),
        (None, 1, 4, False),
        (None, 4, 4, False),
        (None, 2, 4, True),
        ("flat", 2, 4, False),
        ("hierarchical", 2, 4, True),
    ],
)
def test_by_node_where_several_nodes_have_several_ranks(reduction, nodes, ranks, by_node):
    config = small_config(parallel={"nodes": nodes, "reduction": reduction})
    assert Topology.from_config(config, ranks).reduces_by_node == by_node


def test_by_node_needs_nodes():
    with pytest.raises(
        ConfigError, match=r"parallel\.reduction = 'hierarchical': .*needs more than one"
    ):
        small_config(parallel={"reduction": "hierarchical"})


def test_levels():
    """Inside the node, then the ranks at the same place: one group for all kinds."""
    topology = Topology(16, 8, 2, 4, 2, reduces_by_node=True)
    world = tuple(range(16))
    assert topology.reduction_levels(world, 11) == (tuple(range(8, 16)), (3, 11))
    assert topology.reduction_levels(topology.same_part(11), 11) == ((9, 11, 13, 15), (3, 11))
    assert topology.reduction_levels(topology.same_experts(11), 11) == ((11, 15), (3, 11))
    assert topology.reduction_levels((11,), 11) == ()
    assert Topology(16, 8, 2, 4, 2).reduction_levels(world, 11) == (world,)


def test_ranks_of_a_group_agree_on_all_its_groups():
    for numbers in TOPOLOGIES.values():
        topology = Topology(*numbers, reduces_by_node=True)
        for rank in range(topology.num_ranks):
            for name, ranks in topology.groups(rank).items():
                assert rank in ranks
                assert all(topology.groups(other)[name] == ranks for other in ranks)


@pytest.mark.parametrize("nodes, per_node", [(2, 2), (2, 4), (4, 8)])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_gradient_travels_between_nodes_once_for_each_node(nodes, per_node, sharded):
    """Each way 1 - 1/N of the gradients from every node, whatever the ranks; a ring over all
    ranks has 1 - 1/R.
    """
    ranks = nodes * per_node
    weights = [Weight("w", (16 * ranks, 3), "whole"), Weight("v", (ranks,), "whole")]
    size = 4 * sum(math.prod(weight.shape) for weight in weights)
    config = small_config(
        parallel={"nodes": nodes, "shard_optimizer": sharded},
        train={"batch_size": ranks},
        model={"num_moe_layers": 0},
    )
    found = {}
    for by_node in (False, True):
        topology = Topology(ranks, per_node, 1, 4, reduces_by_node=by_node)
        found[by_node] = planned_traffic(config, topology, weights).reduction
    assert found[True].inter_node_bytes == 2 * (nodes - 1) * size
    inside = 2 * (per_node - 1) * size
    assert found[True].intra_node_bytes == nodes * inside
    if not sharded:
        around = 2 * (ranks - 1) * size // ranks
        assert found[False].inter_node_bytes == pytest.approx(nodes * around, abs=2 * ranks)


def test_messages_of_collectives():
    """Rank 1 of two nodes of two: the next in the ring is in the other node."""
    topology = Topology(4, 2, 4, 4)
    world = (0, 1, 2, 3)
    whole = Operation("AllReduce", "g", "", "Float32", (10,), (10,))
    assert node_bytes(whole, world, topology, 1) == (0, 2 * 3 * 40 // 4)
    assert node_bytes(whole, world, topology, 0) == (2 * 3 * 40 // 4, 0)
    part = Operation("ReduceScatter", "g", "", "Float32", (8, 3), (2, 3))
    assert node_bytes(part, world, topology, 1) == (24, 48)
    gather = Operation("AllGather", "g", "", "Float32", (2, 3), (8, 3))
    assert node_bytes(gather, world, topology, 1) == (24, 48)
