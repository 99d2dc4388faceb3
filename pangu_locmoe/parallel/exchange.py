"""The All-to-All between experts and tokens: who sends how many rows to whom, on which way, and
what it cost.

`flat` sends one message for each pair of ranks. `hierarchical` gathers inside the node what goes to
another node, sends one message for each pair of nodes, and scatters inside the node: the same rows
in the same order with fewer messages on the slow links. Both are a list of hops: a block of rows
(from one rank, for one rank) is held by its source at first, and each hop moves every block to its
next holder.

`groupwise` is for tensor parallelism, where all ranks of a replica have the same rows to send: each
carries its portion of every block to its own peers, and the replica gathers the portions over its
fast links. Between the nodes a row travels once instead of once for each rank of the replica.

Letters: R ranks of the group, M rows, D features.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Zero

from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.timeline import Timeline

Block = Tuple[int, int]  # (source, destination), positions in the group
NextHolder = Callable[[Block], int]


@dataclass
class Traffic:
    """What was sent: payload bytes and messages inside the node and between nodes."""

    intra_node_bytes: int = 0
    inter_node_bytes: int = 0
    intra_node_messages: int = 0
    inter_node_messages: int = 0

    def record(self, num_bytes: int, crosses_nodes: bool, messages: int = 1) -> None:
        """One message to another rank, or several of so many bytes together."""
        if crosses_nodes:
            self.inter_node_bytes += num_bytes
            self.inter_node_messages += messages
        else:
            self.intra_node_bytes += num_bytes
            self.intra_node_messages += messages

    def add(self, other: Traffic) -> None:
        """Count what another has as well."""
        self.record(other.intra_node_bytes, False, other.intra_node_messages)
        self.record(other.inter_node_bytes, True, other.inter_node_messages)


@dataclass
class Ledger(Traffic):
    """What this rank sent since the last `take`, in the exchange and in the `reduction` of the
    gradients, and seconds.

    Seconds are those spent in the exchange, waiting for slower ranks included; `reduce_seconds`
    those in the reduction.
    """

    seconds: float = 0.0
    reduce_seconds: float = 0.0
    reduction: Traffic = field(default_factory=Traffic)

    def take(self) -> Ledger:
        """The figures so far; starts again from zero."""
        taken = Ledger(**vars(self))
        self.__init__()  # type: ignore[misc]
        return taken


class Exchange:
    """Moves rows inside one expert-parallel group.

    Args:
        communicator: the way to the others.
        ranks: the group.
        nodes: the node of each of `ranks`.
        hierarchical: by way of the nodes' gateways.
        carriers: the ranks of this rank's replica, which have the same rows, if each shall carry a
            portion (groupwise).
    """

    def __init__(
        self,
        communicator: Communicator,
        ranks: Sequence[int],
        nodes: Sequence[int],
        hierarchical: bool = False,
        carriers: Sequence[int] = (),
    ) -> None:
        self.communicator = communicator
        self.ranks = list(ranks)
        self.nodes = list(nodes)
        self.carriers = list(carriers)
        self.position = self.ranks.index(communicator.rank)
        self.ledger = Ledger()
        self.timeline: Optional[Timeline] = None  # set for the step that is watched
        self._hops: List[NextHolder] = (
            [self._gateway_out, self._gateway_in, _destination] if hierarchical else [_destination]
        )

    def move(self, rows_MD: Tensor, matrix_RR: np.ndarray) -> Tensor:
        """Rows sorted by destination -> rows sorted by source.

        Args:
            rows_MD: this rank's rows, those for the first rank of the group first.
            matrix_RR: how many rows each rank sends to each, int; the same on all ranks.
        """
        with self._timed():
            return (
                self._move_portion(rows_MD, matrix_RR)
                if self.carriers
                else self._move_all(rows_MD, matrix_RR)
            )

    def move_own(self, rows_MD: Tensor, matrix_RR: np.ndarray) -> Tensor:
        """`move` for rows that the other ranks of the replica do not have."""
        with self._timed():
            return self._move_all(rows_MD, matrix_RR)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """What happens inside is an exchange, for the ledger and for the time line, if there is
        one.
        """
        ledger = self.ledger
        began = time.time()
        started = time.perf_counter()
        sent = ledger.intra_node_bytes + ledger.inter_node_bytes
        yield
        ledger.seconds += time.perf_counter() - started
        if self.timeline is not None:
            self.timeline.add(
                "exchange", began, ledger.intra_node_bytes + ledger.inter_node_bytes - sent
            )

    def _move_portion(self, rows_MD: Tensor, matrix_RR: np.ndarray) -> Tensor:
        """Groupwise: this rank's portion of each block to its peers, then the replica's portions
        together.
        """
        own = self.carriers.index(self.communicator.rank)
        carried, portions_XRR, order = portions(matrix_RR, self.position, own, len(self.carriers))
        arrived = self._move_all(_rows(rows_MD, carried), portions_XRR[own])
        gathered = self._gather_portions(arrived, portions_XRR[:, :, self.position].sum(axis=1))
        return _rows(gathered, order)

    def _gather_portions(self, rows_MD: Tensor, counts_X: np.ndarray) -> Tensor:
        """The rows of every carrier, in order."""
        own = int(counts_X[self.carriers.index(self.communicator.rank)])
        carriers = self.carriers
        if own:
            row_bytes = int(np.prod(rows_MD.shape[1:])) * rows_MD.itemsize
            for _ in range(len(carriers) - 1):
                self.ledger.record(own * row_bytes, crosses_nodes=False)
            rows_MD = ops.tile(rows_MD, (len(carriers), *[1] * (rows_MD.ndim - 1)))
        return self.communicator.all_to_all(
            rows_MD, [own] * len(carriers), counts_X.tolist(), carriers
        )

    def _move_all(self, rows_MD: Tensor, matrix_RR: np.ndarray) -> Tensor:
        size = len(self.ranks)
        blocks: List[Block] = [(self.position, destination) for destination in range(size)]
        holder = {
            (source, destination): source for source in range(size) for destination in range(size)
        }
        for next_holder in self._hops:
            rows_MD, blocks = self._hop(rows_MD, blocks, holder, next_holder, matrix_RR)
        return _reorder(rows_MD, blocks, sorted(blocks), matrix_RR)

    def _hop(
        self,
        rows: Tensor,
        blocks: List[Block],
        holder: dict[Block, int],
        next_holder: NextHolder,
        matrix_RR: np.ndarray,
    ) -> Tuple[Tensor, List[Block]]:
        """Send every block to its next holder; `holder` is updated for all ranks alike."""
        after = {block: next_holder(block) for block in holder}
        ordered = sorted(blocks, key=lambda block: (after[block], block))
        rows = _reorder(rows, blocks, ordered, matrix_RR)
        size = len(self.ranks)
        traffic_RR = np.zeros((size, size), dtype=np.int64)
        for block, now in holder.items():
            traffic_RR[now, after[block]] += matrix_RR[block]
        row_bytes = int(np.prod(rows.shape[1:])) * rows.itemsize
        for target, count in enumerate(traffic_RR[self.position].tolist()):
            if count and target != self.position:
                self.ledger.record(
                    count * row_bytes, self.nodes[target] != self.nodes[self.position]
                )
        rows = self.communicator.all_to_all(
            rows,
            traffic_RR[self.position].tolist(),
            traffic_RR[:, self.position].tolist(),
            self.ranks,
        )
        arrived = [block for block in holder if after[block] == self.position]
        arrived.sort(key=lambda block: (holder[block], block))
        holder.update(after)
        return rows, arrived

    def _gateway_out(self, block: Block) -> int:
        """In the source's node, the rank that speaks for it to the destination's node."""
        source, destination = block
        if self.nodes[source] == self.nodes[destination]:
            return destination
        return self._gateway(self.nodes[source], self.nodes[destination])

    def _gateway_in(self, block: Block) -> int:
        source, destination = block
        if self.nodes[source] == self.nodes[destination]:
            return destination
        return self._gateway(self.nodes[destination], self.nodes[source])

    def _gateway(self, node: int, other: int) -> int:
        """Node pairs are dealt over a node's ranks, so that no rank speaks for all."""
        members = [position for position, own in enumerate(self.nodes) if own == node]
        return members[other % len(members)]


class ExchangeRows(nn.Cell):
    """`Exchange.move` with its gradient: the same way back, with the matrix transposed.

    PyNative.
    """

    def __init__(self, exchange: Exchange, matrix_RR: np.ndarray) -> None:
        super().__init__()
        self.exchange = exchange
        self.matrix_RR = matrix_RR

    def construct(self, rows_MD: Tensor) -> Tensor:
        return self.exchange.move(rows_MD, self.matrix_RR)

    def bprop(self, rows_MD: Tensor, out: Tensor, grad_MD: Tensor) -> Tuple[Any]:
        return (self.exchange.move(grad_MD, self.matrix_RR.T),)


def portions(
    matrix_RR: np.ndarray, position: int, own: int, count: int
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How `count` ranks of a replica, this one the `own`th, share out a move.

    Returns:
        the rows that this rank carries, as indices; how many rows each of the `count` carries from
        each rank to each, [count, R, R]; the order in which the rows that arrived, carrier by
        carrier and by source in each, are sorted by source.
    """
    bounds_XRR = np.arange(count + 1)[:, None, None] * matrix_RR // count
    portions_XRR = np.diff(bounds_XRR, axis=0)
    first_R = np.cumsum(matrix_RR[position]) - matrix_RR[position]
    carried = _ranges(first_R + bounds_XRR[own, position], portions_XRR[own, position])
    received_XR = portions_XRR[:, :, position]
    starts_XR = (np.cumsum(received_XR) - received_XR.reshape(-1)).reshape(received_XR.shape)
    return carried, portions_XRR, _ranges(starts_XR.T.reshape(-1), received_XR.T.reshape(-1))


def _destination(block: Block) -> int:
    return block[1]


def _reorder(
    rows: Tensor, blocks: List[Block], wanted: List[Block], matrix_RR: np.ndarray
) -> Tensor:
    """Rows of `blocks` in the order of `wanted`."""
    if blocks == wanted or rows.shape[0] == 0:
        return rows
    sizes = [int(matrix_RR[block]) for block in blocks]
    starts = dict(zip(blocks, np.cumsum([0, *sizes]).tolist()))
    index = _ranges(
        np.asarray([starts[block] for block in wanted]),
        np.asarray([matrix_RR[block] for block in wanted]),
    )
    return _rows(rows, index)


def _ranges(starts_X: np.ndarray, counts_X: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each range, one after the other."""
    return np.concatenate(
        [
            np.arange(start, start + count)
            for start, count in zip(starts_X.tolist(), counts_X.tolist())
        ]
    )


def _rows(rows: Tensor, index_M: np.ndarray) -> Tensor:
    """Some rows; without any an empty tensor, for which there are no kernels."""
    if len(index_M) == 0:
        return Tensor(shape=(0, *rows.shape[1:]), dtype=rows.dtype, init=Zero())
    return ops.gather(rows, Tensor(index_M.astype(np.int32)), 0)
