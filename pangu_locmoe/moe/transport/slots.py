"""The transport with sizes that are constants, so that a whole step compiles as one graph.

A source has a fixed number of slots for each expert: more for experts in its own node
(`moe.capacity.local_factor`) than for remote ones (`remote_factor`). Its tokens of the highest
affinity take them, the rest are dropped, and all slots travel, filled or not. What crosses the
nodes is therefore set by `remote_factor`, and shrinks with it.

    slots -> exchange -> [E_local, slots of all sources, D] -> experts -> exchange back

On HCCL the exchange is one AlltoAllV with constant counts; on CPU processes the same runs in
PyNative.

With `parallel.overlap_chunks` the slots travel in chunks: all are sent off first, and each is
computed and sent back as it arrives, so that a device that exchanges and computes at the same time
has the exchange of one under the computation of another.

Letters: A assignments of this rank's tokens (moe/plan.py), D hidden, E experts, R ranks of the
expert-parallel group, Q token slots of this rank, U replicas of the world, N nodes, G local
experts, C slots of all sources for one expert.
"""

from __future__ import annotations

from typing import Dict, List, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.config import CapacityConfig, Config
from pangu_locmoe.config.routers import top_k
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.moe import dispatch
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.experts import Experts
from pangu_locmoe.moe.losses import log_of
from pangu_locmoe.moe.plan import RoutingPlan, Shared
from pangu_locmoe.moe.slot_sizes import group_slots
from pangu_locmoe.moe.transport.base import Packed, RankTransport
from pangu_locmoe.parallel.exchange import Exchange, ExchangeRows
from pangu_locmoe.parallel.hccl import AllToAllRows, GatherRows, GroupwiseRows, HcclOperators
from pangu_locmoe.parallel.topology import Topology


class SlotExchange(nn.Cell):
    """Slots to the experts and back. layout_2E has the slots for each expert and where they begin,
    in one chunk.

    Args:
        exchange: the way to the others.
        slots_RE: slots of each source of the group for each expert, in one chunk.
        features: D.
        chunks: how many exchanges the slots are divided over; those of a chunk lie together.
    """

    def __init__(
        self, exchange: Exchange, slots_RE: np.ndarray, features: int, chunks: int = 1
    ) -> None:
        super().__init__()
        size = len(exchange.ranks)
        position = exchange.position
        groups = slots_RE.shape[1] // size
        self.chunks = chunks
        starts_E = np.cumsum(slots_RE[position]) - slots_RE[position]
        self.layout_2E = Tensor(np.stack([slots_RE[position], starts_E]).astype(np.int32))
        self.slots = int(slots_RE[position].sum())
        matrix_RR = slots_RE.reshape(size, size, groups).sum(axis=2)
        self.there, self.back = (
            _mover(exchange, matrix, features) for matrix in (matrix_RR, matrix_RR.T)
        )
        self.in_two_parts = isinstance(self.there, AllToAllRows)
        # A source sends as much to all experts of one rank: its part of every local expert's
        # buffer is as wide.
        width_R = slots_RE[:, position * groups]
        self.buffers = (groups, int(width_R.sum()), features)
        self.sorted_by_source = groups == 1
        row_of_position = _rows_by_expert(width_R, groups)
        self.row_of_position = Tensor((row_of_position + 1).astype(np.int32))
        self.position_of_row = Tensor((np.argsort(row_of_position) + 1).astype(np.int32))
        self.reorder = dispatch.Dispatch()

    def to_experts(self, rows_QD: Tensor) -> Tensor:
        """x_GCD on the experts' ranks."""
        return self.arrive(self.depart(rows_QD))

    def depart(self, rows_QD: Tensor) -> Tensor:
        """Slots on their way to the experts; `arrive` waits for them where that can be told apart."""
        return self.there.depart(rows_QD) if self.in_two_parts else self.there(rows_QD)

    def arrive(self, rows: Tensor) -> Tensor:
        """x_GCD of what departed."""
        if self.in_two_parts:
            rows = self.there.arrive(rows)
        if not self.sorted_by_source:
            rows = self.reorder(rows, self.row_of_position, self.position_of_row)
        return ops.reshape(rows, self.buffers)

    def from_experts(self, y_GCD: Tensor) -> Tensor:
        """rows_QD on the tokens' ranks, in the order in which they left."""
        rows = ops.reshape(y_GCD, (-1, y_GCD.shape[2]))
        if not self.sorted_by_source:
            rows = self.reorder(rows, self.position_of_row, self.row_of_position)
        return self.back(rows)


class SlotsTransport(RankTransport):
    """All slots of a rank travel, and as many in every step."""

    packed_names = (*RankTransport.packed_names, "dropped_E")

    def __init__(self, config: Config, topology: Topology, exchange: Exchange) -> None:
        super().__init__(config, topology, exchange)
        self.ranks_per_replica = topology.tensor_parallel
        self.num_replicas = topology.num_replicas
        self.num_nodes = topology.num_nodes
        self.replicas_per_node = topology.replicas_per_node
        self.chunks = config.parallel.overlap_chunks
        self.num_tokens = config.micro_batch * config.model.seq_length // topology.num_replicas
        self.top_k = top_k(config)
        self.features = config.model.hidden_size
        self.set_factors(config.moe.capacity)
        self._evaluated: Dict[Tuple[int, int], SlotExchange] = {}
        self.gather = _gather(exchange)

    def set_factors(self, capacity: CapacityConfig) -> None:
        """Train with the slots of these factors from now on.

        Raises:
            ConfigError: the ranks of a replica cannot share them evenly.
        """
        rank = self.exchange.communicator.rank
        slots_RE = group_slots(capacity, self.topology, rank, self.num_tokens, self.top_k)
        what = "slots of a source for an expert"
        _check_divisible(slots_RE, "parallel.overlap_chunks", self.chunks, what)
        slots_RE = slots_RE // self.chunks
        rows_RE = slots_RE * self.topology.experts_per_rank
        what = "rows from a rank to another (exchange: groupwise)"
        carriers = len(self.exchange.carriers) or 1
        _check_divisible(rows_RE, "parallel.tensor_parallel", carriers, what)
        self.trained = SlotExchange(self.exchange, slots_RE, self.features, self.chunks)

    def layout(self, num_tokens: int, capacity: int, training: bool) -> Tuple[Tensor, int]:
        way = self.trained if training else self._for_evaluation(num_tokens, capacity)
        return way.layout_2E, way.slots

    def pack(
        self,
        x_AD: Tensor,
        plan: RoutingPlan,
        load_E: Tensor,
        layout: Tensor,
        room: int,
        training: bool,
    ) -> Packed:
        """`room` is the number of slots in a chunk."""
        slots_E = layout[0]
        start_E = layout[1]
        chunks = self.chunks if training else 1
        affinity_A = plan["affinity_A"] if self.by_affinity else None
        position_A = dispatch.position_within_expert(plan["one_hot_AE"], affinity_A)
        expert_A = plan["expert_A"]
        width_A = ops.gather(slots_E, expert_A, 0)
        kept_A = ops.cast(ops.less(position_A, width_A * chunks), ms.int32)
        offset_A = position_A
        if chunks > 1:  # the best tokens are in the first chunk; what was not proposed has rank -1
            chunk_A = ops.floor_div(ops.maximum(position_A, 0), ops.maximum(width_A, 1))
            offset_A = position_A + chunk_A * (room - width_A)
        slot_of_row_A = (ops.gather(start_E, expert_A, 0) + offset_A + 1) * kept_A
        row_of_slot_Q = dispatch.row_of_slot(slot_of_row_A, room * chunks)
        return {
            "rows_QD": self.dispatch(x_AD, row_of_slot_Q, slot_of_row_A),
            "row_of_slot_Q": row_of_slot_Q,
            "slot_of_row_A": slot_of_row_A,
            "dropped_E": ops.relu(load_E - ops.cast(slots_E * chunks, ms.float32)),
        }

    def share(self, own_load_NE: Tensor, own_probs_NE: Tensor) -> Shared:
        own_X = ops.reshape(ops.concat((own_load_NE, own_probs_NE), 0), (-1,))
        shared_UX = ops.stop_gradient(self.gather(ops.stop_gradient(own_X)))
        if (
            self.ranks_per_replica > 1
        ):  # the ranks of a replica have the same tokens: its first one speaks for it
            shared_UX = shared_UX[:: self.ranks_per_replica]
        by_node = (self.num_nodes, self.replicas_per_node, 2, self.num_experts)
        shared_N2E = ops.reduce_sum(ops.reshape(shared_UX, by_node), 1)
        probs_NE = shared_N2E[:, 1] * (1.0 / self.replicas_per_node)
        return {
            "load_NE": shared_N2E[:, 0],
            "probs_NE": probs_NE,
            "log_probs_NE": log_of(probs_NE),
        }

    def carry(
        self, experts: Experts, packed: Packed, shared: Shared, capacity: int, training: bool
    ) -> Tuple[Tensor, Tensor]:
        """While training `capacity` is of no account; evaluation has a slot for every token."""
        num_tokens = packed["slot_of_row_A"].shape[0] // self.choices
        way = self.trained if training else self._for_evaluation(num_tokens, capacity)
        rows_QD = packed["rows_QD"]
        if way.chunks == 1:
            y_GCD = experts(way.to_experts(rows_QD), None)
            return way.from_experts(y_GCD), packed["dropped_E"]
        return _in_chunks(way, experts, rows_QD), packed["dropped_E"]

    def _for_evaluation(self, num_tokens: int, capacity: int) -> SlotExchange:
        """As many slots for each expert as there are tokens, or as many as `capacity`; PyNative."""
        if (num_tokens, capacity) not in self._evaluated:
            slots = capacity if capacity != DROPLESS else num_tokens
            slots_RE = np.full((len(self.exchange.ranks), self.num_experts), slots)
            way = SlotExchange(self.exchange, slots_RE, self.features)
            self._evaluated[num_tokens, capacity] = way
        return self._evaluated[num_tokens, capacity]


def _in_chunks(way: SlotExchange, experts: Experts, rows_QD: Tensor) -> Tensor:
    """Slots through the experts and back, the exchange of a chunk under the computation of another.

    A graph's operators have no order but that of their data. So a chunk departs after the one
    before, and the device waits for it only when the experts are through with the one before:
    without these dependences it sends the last one first and waits for all of them at once.
    """
    departed: List[Tensor] = []
    for chunk in ops.split(rows_QD, way.slots, 0):
        departed.append(way.depart(ops.depend(chunk, departed[-1]) if departed else chunk))
    returned = []
    y_GCD = None
    for rows in departed:
        if y_GCD is not None:
            rows = ops.depend(rows, y_GCD)
        y_GCD = experts(way.arrive(rows), None)
        returned.append(way.from_experts(y_GCD))
    return ops.concat(returned, 0)


def _check_divisible(numbers_RE: np.ndarray, key: str, divisor: int, what: str) -> None:
    uneven = numbers_RE[numbers_RE % divisor > 0]
    if len(uneven):
        raise ConfigError(
            f"{key} = {divisor}: cannot divide {int(uneven[0])} {what}; change "
            "moe.capacity.local_factor or remote_factor"
        )


class _PyNativeGather(nn.Cell):
    """The communicator's own, for what is not compiled."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.communicator = exchange.communicator

    def construct(self, x_M: Tensor) -> Tensor:
        return self.communicator.all_gather(x_M)


def _mover(exchange: Exchange, matrix_RR: np.ndarray, features: int) -> nn.Cell:
    if isinstance(exchange.communicator, HcclOperators):
        communicator = exchange.communicator
        carriers = exchange.carriers
        group = communicator.group(exchange.ranks)
        if carriers:
            own = carriers.index(communicator.rank)
            return GroupwiseRows(
                group,
                communicator.group(carriers),
                features,
                matrix_RR,
                exchange.position,
                own,
                len(carriers),
            )
        return AllToAllRows(
            group,
            features,
            matrix_RR[exchange.position].tolist(),
            matrix_RR[:, exchange.position].tolist(),
        )
    return ExchangeRows(exchange, matrix_RR)


def _gather(exchange: Exchange) -> nn.Cell:
    communicator = exchange.communicator
    if isinstance(communicator, HcclOperators):
        return GatherRows(communicator.group(range(communicator.size)))
    return _PyNativeGather(exchange)


def _rows_by_expert(width_R: np.ndarray, groups: int) -> np.ndarray:
    """For each position in [G, C] the received row: rows come by source, then by local expert."""
    first_R = np.cumsum(width_R * groups) - width_R * groups
    return np.concatenate(
        [
            first + group * width + np.arange(width)
            for group in range(groups)
            for first, width in zip(first_R, width_R)
        ]
    )
