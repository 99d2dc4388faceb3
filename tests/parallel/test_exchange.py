"""The exchange against the plain permutation, for any number of ranks and nodes, all in one
process.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, ops
from support import lockstep

from pangu_locmoe.parallel.exchange import Exchange, ExchangeRows, Ledger, Traffic

FEATURES = 3


@st.composite
def jobs(draw):
    """(node of each rank, matrix of counts); nodes may differ in size, many counts are zero."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    nodes = [node for node, size in enumerate(sizes) for _ in range(size)]
    counts = st.one_of(st.just(0), st.integers(0, 4))
    matrix = draw(
        st.lists(
            st.lists(counts, min_size=len(nodes), max_size=len(nodes)),
            min_size=len(nodes),
            max_size=len(nodes),
        )
    )
    return nodes, np.array(matrix)


def rows_of(rank: int, matrix_RR: np.ndarray) -> np.ndarray:
    """Every number of every row of every rank is another one."""
    count = int(matrix_RR[rank].sum())
    return (1000.0 * rank + np.arange(count * FEATURES)).reshape(count, FEATURES).astype(np.float32)


def tensor(rows: np.ndarray) -> Tensor:
    return Tensor(rows)


def move(nodes, matrix_RR, hierarchical, rows=None):
    """(rows, ledger) of each rank after one move."""

    def one(rank: lockstep.LockstepRank):
        exchange = Exchange(rank, range(len(nodes)), nodes, hierarchical)
        own = rows_of(rank.rank, matrix_RR) if rows is None else rows[rank.rank]
        return exchange.move(tensor(own), matrix_RR).asnumpy(), exchange.ledger

    return list(zip(*lockstep.run(len(nodes), one)))


def permuted(matrix_RR: np.ndarray) -> list[np.ndarray]:
    """What every rank should hold afterwards."""
    size = len(matrix_RR)
    parts = [
        np.split(rows_of(source, matrix_RR), np.cumsum(matrix_RR[source])[:-1])
        for source in range(size)
    ]
    return [
        np.concatenate([parts[source][target] for source in range(size)]) for target in range(size)
    ]


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_both_ways_are_the_permutation(job):
    nodes, matrix_RR = job
    for hierarchical in (False, True):
        for got, wanted in zip(move(nodes, matrix_RR, hierarchical)[0], permuted(matrix_RR)):
            np.testing.assert_array_equal(got, wanted)


@settings(max_examples=30, deadline=None)
@given(jobs(), st.booleans())
def test_the_transpose_is_the_way_back(job, hierarchical):
    nodes, matrix_RR = job
    there, _ = move(nodes, matrix_RR, hierarchical)
    back, _ = move(nodes, matrix_RR.T, hierarchical, there)
    for rank, got in enumerate(back):
        np.testing.assert_array_equal(got, rows_of(rank, matrix_RR))


@settings(max_examples=40, deadline=None)
@given(jobs())
def test_the_ledger_against_the_closed_form(job):
    nodes, matrix_RR = job
    node_R = np.array(nodes)
    row_bytes = FEATURES * 4
    crosses_RR = node_R[:, None] != node_R[None]
    inside_RR = ~crosses_RR & ~np.eye(len(nodes), dtype=bool)
    flat = move(nodes, matrix_RR, False)[1]
    tree = move(nodes, matrix_RR, True)[1]
    crossing = int(matrix_RR[crosses_RR].sum()) * row_bytes
    assert sum(ledger.inter_node_bytes for ledger in flat) == crossing
    assert sum(ledger.inter_node_bytes for ledger in tree) == crossing
    assert (
        sum(ledger.intra_node_bytes for ledger in flat)
        == int(matrix_RR[inside_RR].sum()) * row_bytes
    )
    assert sum(ledger.inter_node_messages for ledger in flat) == np.count_nonzero(
        matrix_RR[crosses_RR]
    )
    pairs = {(one, other) for one in set(nodes) for other in set(nodes) if one != other}
    used = [
        (one, other)
        for one, other in pairs
        if matrix_RR[np.ix_(node_R == one, node_R == other)].any()
    ]
    assert sum(ledger.inter_node_messages for ledger in tree) == len(used) <= len(pairs)
    # Rows that cross and do not start or end at a gateway make the way inside the node too.
    extra = 0
    for source, target in zip(*np.nonzero(crosses_RR)):
        out = np.flatnonzero(node_R == node_R[source])
        into = np.flatnonzero(node_R == node_R[target])
        hops = int(out[nodes[target] % len(out)] != source) + int(
            into[nodes[source] % len(into)] != target
        )
        extra += hops * int(matrix_RR[source, target]) * row_bytes
    assert (
        sum(ledger.intra_node_bytes for ledger in tree)
        == int(matrix_RR[inside_RR].sum()) * row_bytes + extra
    )


@settings(max_examples=20, deadline=None)
@given(jobs(), st.integers(2, 4))
def test_groupwise_is_flat_with_every_row_once_between_nodes(job, width):
    """Each replica of the job is `width` ranks now, which have the same rows."""
    nodes, matrix_RR = job
    size = len(nodes)

    def one(rank: lockstep.LockstepRank):
        replica, tensor_position = divmod(rank.rank, width)
        peers = range(tensor_position, size * width, width)
        exchange = Exchange(
            rank, peers, nodes, carriers=range(replica * width, (replica + 1) * width)
        )
        return exchange.move(
            tensor(rows_of(replica, matrix_RR)), matrix_RR
        ).asnumpy(), exchange.ledger

    found = lockstep.run(size * width, one)
    for rank, (got, _) in enumerate(found):
        np.testing.assert_array_equal(got, permuted(matrix_RR)[rank // width])
    flat = move(nodes, matrix_RR, False)[1]
    assert sum(ledger.inter_node_bytes for _, ledger in found) == sum(
        ledger.inter_node_bytes for ledger in flat
    )


def test_a_full_exchange_sends_one_message_for_each_pair_of_nodes():
    nodes = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    ones_RR = np.ones((9, 9), int)
    assert sum(ledger.inter_node_messages for ledger in move(nodes, ones_RR, False)[1]) == 54
    tree = move(nodes, ones_RR, True)[1]
    assert [ledger.inter_node_messages for ledger in tree] == [0, 1, 1, 1, 0, 1, 1, 1, 0], (
        "N(N-1), dealt over the ranks of a node"
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32])
def test_bytes_follow_the_type(dtype):
    rows = [np.arange(6).reshape(2, 3).astype(dtype), np.arange(3).reshape(1, 3).astype(dtype)]
    matrix_RR = np.array([[1, 1], [1, 0]])
    got, ledgers = move([0, 1], matrix_RR, False, rows)
    assert got[0].dtype == dtype and [row.tolist() for row in got[0]] == [[0, 1, 2], [0, 1, 2]]
    assert [ledger.inter_node_bytes for ledger in ledgers] == [3 * np.dtype(dtype).itemsize] * 2


def test_take_starts_again_from_zero():
    ledger = Ledger()
    ledger.record(5, True)
    ledger.record(7, False)
    ledger.reduction.record(9, False, 2)
    ledger.seconds += 1.5
    assert ledger.take() == Ledger(7, 5, 1, 1, 1.5, reduction=Traffic(9, 0, 2, 0))
    assert ledger == Ledger()


class _Shift:
    """An exchange of one rank with itself that is no identity: rows move by as many positions as
    the matrix says.
    """

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def move(self, rows_MD: Tensor, matrix_RR: np.ndarray) -> Tensor:
        self.calls.append(matrix_RR.tolist())
        turn = int(matrix_RR[0, 1] - matrix_RR[1, 0])
        return ops.gather(
            rows_MD, Tensor(np.roll(np.arange(rows_MD.shape[0]), turn).astype(np.int32)), 0
        )


def test_the_gradient_takes_the_transposed_matrix_back():
    matrix_RR = np.array([[0, 3], [1, 0]])
    shift = _Shift()
    cell = ExchangeRows(shift, matrix_RR)  # type: ignore[arg-type]
    x_MD, factor_MD = np.random.default_rng(0).normal(size=(2, 4, FEATURES)).astype(np.float32)

    def objective(rows_MD: Tensor) -> Tensor:
        moved = cell(rows_MD * rows_MD)
        return ops.reduce_sum(moved * Tensor(factor_MD))

    gradient = ms.grad(objective)(Tensor(x_MD)).asnumpy()
    np.testing.assert_allclose(gradient, 2 * x_MD * np.roll(factor_MD, -2, 0), rtol=1e-6)
    assert shift.calls == [matrix_RR.tolist(), matrix_RR.T.tolist()]
