"""What is handed to HCCL's operators; the operators are stand-ins, because there is no device."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from pangu_locmoe.parallel import hccl
from pangu_locmoe.parallel.hccl import HcclOperators, group_name
from pangu_locmoe.parallel.topology import Topology


class Calls(list):
    """(operator, its group, further settings, arguments) of each call; operators made, by kind."""

    made: list


@pytest.fixture
def calls(monkeypatch):
    record = Calls()
    record.made = []

    def stand_in(kind, result):
        def make(*settings):
            record.made.append((kind, *settings))

            def call(x, *arguments):
                record.append((kind, settings, tuple(x.shape), arguments))
                return result(x, *arguments)

            return call

        return make

    monkeypatch.setattr(
        hccl.ops, "AllReduce", stand_in("AllReduce", lambda x: x * 2), raising=False
    )
    monkeypatch.setattr(
        hccl.ops, "AllGather", stand_in("AllGather", lambda x: ops.tile(x, (4, 1))), raising=False
    )

    def all_to_all(x, sent, received):
        # As documented: without anything to receive the result is a scalar without a meaning.
        block = record[-1][1][1]
        return (
            ops.zeros((sum(received) * block,), x.dtype)
            if sum(received)
            else ops.zeros((), x.dtype)
        )

    monkeypatch.setattr(hccl.ops, "AlltoAllV", stand_in("AlltoAllV", all_to_all), raising=False)
    return record


@pytest.fixture
def created():
    return []


@pytest.fixture
def communicator(created):
    return HcclOperators(rank=1, size=4, create=lambda name, ranks: created.append((name, ranks)))


def rows(count, features=3, dtype=np.float32):
    return Tensor(np.ones((count, features), dtype))


def test_groups_are_made_once_and_only_when_they_are_used(communicator, created, calls):
    assert created == []
    for _ in range(3):
        communicator.all_reduce(rows(2), [0, 1])
        communicator.all_to_all(rows(2), [1, 1], [1, 1], [0, 1])
    assert created == [("ranks-0-to-1-by-1", [0, 1])]
    assert len(calls.made) == 2  # one operator of each kind, too


def test_the_world_is_not_made(communicator, created, calls):
    communicator.all_reduce(rows(2), range(4))
    communicator.all_gather(rows(2))
    communicator.barrier()
    assert created == []
    assert {made[1 if made[0] == "AllGather" else 2] for made in calls.made} == {"hccl_world_group"}


def test_only_a_member_makes_a_group(communicator):
    with pytest.raises(ValueError, match=r"rank 1 is no member of \(2, 3\)"):
        communicator.group([2, 3])


def test_a_group_of_one_is_no_communication(communicator, created, calls):
    x = rows(2)
    assert communicator.all_reduce(x, [1]) is x
    assert communicator.all_to_all(x, [2], [2], [1]) is x
    assert (created, calls) == ([], [])


def test_all_reduce_is_a_sum(communicator, calls):
    communicator.all_reduce(rows(2), (1, 3))
    assert calls[0][:2] == ("AllReduce", (ops.ReduceOp.SUM, "ranks-1-to-3-by-2"))


def test_all_gather_has_a_row_for_each_rank(communicator, calls):
    assert communicator.all_gather(rows(2)).shape == (4, 2, 3)
    assert calls[0][2] == (1, 6)
    assert communicator.all_gather(Tensor(np.float32(1.0))).shape == (4,)


def test_counts_are_in_rows(communicator, calls):
    arrived = communicator.all_to_all(rows(5), [3, 2], [1, 6], [0, 1])
    assert calls == [("AlltoAllV", ("ranks-0-to-1-by-1", 3), (15,), ([3, 2], [1, 6]))]
    assert arrived.shape == (7, 3)


def test_rows_may_have_several_axes_or_another_dtype(communicator, calls):
    x = Tensor(np.ones((4, 2, 5), np.float16))
    arrived = communicator.all_to_all(x, [2, 2], [3, 3], [0, 1])
    assert calls[0][1][1] == 10
    assert (arrived.shape, arrived.dtype) == ((6, 2, 5), ms.float16)


def test_a_rank_with_nothing_to_send_takes_part(communicator, calls):
    empty = Tensor(shape=(0, 3), dtype=ms.float32, init=hccl.Zero())
    assert communicator.all_to_all(empty, [0, 0], [2, 0], [0, 1]).shape == (2, 3)
    assert calls[0][2:] == ((3,), ([0, 0], [2, 0]))


def test_a_rank_with_nothing_to_receive_has_no_rows(communicator, calls):
    assert communicator.all_to_all(rows(2), [2, 0], [0, 0], [0, 1]).shape == (0, 3)


@pytest.mark.parametrize(
    "size, per_node, expert_parallel", [(8, 8, 8), (64, 8, 16), (256, 8, 8), (256, 16, 256)]
)
def test_a_rank_has_three_groups_at_most_and_all_members_call_them_the_same(
    size, per_node, expert_parallel
):
    topology = Topology(size, per_node, expert_parallel, 256)
    names = {}
    for rank in range(size):
        communicator = HcclOperators(rank, size, lambda name, ranks: None)
        for ranks in (range(size), topology.expert_group(rank), topology.same_experts(rank)):
            if len(ranks) > 1:
                name = communicator.group(ranks)
                assert names.setdefault(name, tuple(ranks)) == tuple(ranks)
        assert len(communicator.groups) <= 3
    assert max(map(len, names)) < 128  # HCCL's limit
    assert len(set(names.values())) == len(names)


def test_irregular_groups_have_names_too():
    one = group_name([0, 1, 5], 8)
    other = group_name([0, 1, 6], 8)
    assert one != other and max(len(one), len(other)) < 128
    assert group_name(range(8), 8) == "hccl_world_group"


def test_deterministic_is_asked_for_before_joining(monkeypatch):
    order = []
    monkeypatch.setattr(hccl.ms, "set_device", lambda device: order.append(device))
    monkeypatch.setattr(hccl.ms, "set_deterministic", lambda flag: order.append(flag))
    monkeypatch.setattr(hccl, "init", lambda backend: order.append(backend))
    monkeypatch.setattr(hccl, "get_rank", lambda: 2)
    monkeypatch.setattr(hccl, "get_group_size", lambda: 4)
    monkeypatch.delenv("HCCL_DETERMINISTIC", raising=False)
    assert (hccl.HCCL().rank, order) == (2, ["Ascend", "hccl"])
    order.clear()
    monkeypatch.setenv("HCCL_DETERMINISTIC", "true")
    assert (hccl.HCCL().size, order) == (4, ["Ascend", True, "hccl"])


def test_a_job_on_ascend_joins_over_hccl(monkeypatch):
    from pangu_locmoe.parallel.world import join

    monkeypatch.setattr(hccl, "HCCL", lambda: "joined")
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("PANGU_LOCMOE_DEVICE", "Ascend")
    assert join() == "joined"


def test_cells_for_the_graph_have_constant_sizes(calls):
    cell = hccl.AllToAllRows("g", 3, np.array([2, 1]), np.array([1, 4]))
    assert cell(rows(3)).shape == (5, 3)
    assert calls == [("AlltoAllV", ("g", 3), (9,), ((2, 1), (1, 4)))]
    assert all(type(count) is int for count in (*cell.sent, *cell.received))
