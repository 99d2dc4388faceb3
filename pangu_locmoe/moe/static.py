"""The MoE layer across processes with sizes that are constants, so that a whole step compiles as one graph.

A source has a fixed number of slots for each expert: more for experts in its own node (`moe.capacity.local_factor`) than
for remote ones (`remote_factor`). Its tokens of the highest affinity take them, the rest are dropped, and all slots
travel, filled or not. What crosses the nodes is therefore set by `remote_factor`, and shrinks with it.

    route -> slots -> exchange -> [E_local, slots of all sources, D] -> experts -> exchange back -> combine

On HCCL the exchange is one AlltoAllV with constant counts; on CPU processes the same layer runs in PyNative.

With `parallel.overlap_chunks` the slots travel in chunks: all are sent off first, and each is computed and sent back as it
arrives, so that a device that exchanges and computes at the same time has the exchange of one under the computation of another.

Letters: T tokens of this rank, A their assignments (moe/plan.py; most routers: A = T), D hidden, E experts, R ranks of the
expert-parallel group, P slots of this rank (places of the world in shared_PX), G local experts, C slots of all sources for one
expert.
"""

from __future__ import annotations

from typing import Dict, Iterator, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.config import CapacityConfig, Config
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.moe import dispatch, losses
from pangu_locmoe.moe.capacity import DROPLESS, factor_capacity
from pangu_locmoe.moe.layer import MoEStats
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.moe.sharded import ShardedMoELayer
from pangu_locmoe.moe.slot_factors import automatic, starting_factors
from pangu_locmoe.noise import Noise
from pangu_locmoe.parallel.exchange import Exchange, ExchangeRows
from pangu_locmoe.parallel.hccl import AllToAllRows, GatherRows, HcclOperators, SharedRows
from pangu_locmoe.parallel.tensor import TensorGroup
from pangu_locmoe.parallel.topology import Topology


def source_slots(capacity: CapacityConfig, topology: Topology, rank: int, num_tokens: int) -> np.ndarray:
    """Slots that a rank has for each expert, int [E]; `num_tokens` is the rank's T.

    With tensor parallelism rounded up, so that the ranks of a place can share them out evenly.
    """
    capacity, place_ranks = starting_factors(capacity), topology.tensor_parallel
    local, remote = (
        min(num_tokens, -(-factor_capacity(float(factor or 0.0), num_tokens, topology.num_experts) // place_ranks) * place_ranks)
        for factor in (capacity.local_factor, capacity.remote_factor)
    )
    holders = np.repeat(topology.expert_group(rank), topology.experts_per_rank)
    nodes = holders // topology.ranks_per_node
    return np.where(nodes == topology.node_of_rank(rank), local, remote).astype(np.int64)


def group_slots(capacity: CapacityConfig, topology: Topology, rank: int, num_tokens: int) -> np.ndarray:
    """`source_slots` of all ranks of this rank's expert-parallel group, int [R, E]."""
    return np.stack([source_slots(capacity, topology, source, num_tokens) for source in topology.expert_group(rank)])


def certain_drops(config: Config, topology: Topology, rank: int, num_tokens: int) -> Iterator[str]:
    """What these capacities must drop, one line each; nothing where all tokens could find a slot, or slots follow the tokens."""
    if automatic(config.moe.capacity):
        return
    slots_E = source_slots(config.moe.capacity, topology, rank, num_tokens)
    holders = np.repeat(topology.expert_group(rank), topology.experts_per_rank) // topology.ranks_per_node
    local_E = holders == topology.node_of_rank(rank)
    if slots_E.sum() < num_tokens:
        yield f"a rank has {slots_E.sum()} slots for {num_tokens} tokens: at least {1 - slots_E.sum() / num_tokens:.0%} are dropped"
    elif slots_E[local_E].sum() < num_tokens:
        lost = 1 - slots_E[local_E].sum() / num_tokens
        needed = topology.num_experts / max(1, int(local_E.sum()))
        yield f"if all tokens stay in their node, {lost:.0%} are dropped: moe.capacity.local_factor would have to be {needed:g}"


class SlotExchange(nn.Cell):
    """Slots to the experts and back.

    Args:
        exchange: the way to the others.
        slots_RE: slots of each source of the group for each expert, in one chunk.
        features: D.
        chunks: how many exchanges the slots are divided over; those of a chunk lie together.
    """

    def __init__(self, exchange: Exchange, slots_RE: np.ndarray, features: int, chunks: int = 1) -> None:
        super().__init__()
        size, place = len(exchange.ranks), exchange.place
        groups = slots_RE.shape[1] // size
        self.chunks = chunks
        self.slots_E = Tensor(slots_RE[place].astype(np.int32))
        self.start_E = Tensor((np.cumsum(slots_RE[place]) - slots_RE[place]).astype(np.int32))
        self.slots = int(slots_RE[place].sum())
        matrix_RR = slots_RE.reshape(size, size, groups).sum(axis=2)
        self.there, self.back = (_mover(exchange, matrix, features) for matrix in (matrix_RR, matrix_RR.T))
        # A source sends as much to all experts of one rank: its share of every local expert's buffer is as wide.
        width_R = slots_RE[:, place * groups]
        self.buffers = (groups, int(width_R.sum()), features)
        self.sorted_by_source = groups == 1
        row_of_place = _rows_by_expert(width_R, groups)
        self.row_of_place = Tensor((row_of_place + 1).astype(np.int32))
        self.place_of_row = Tensor((np.argsort(row_of_place) + 1).astype(np.int32))
        self.reorder = dispatch.Dispatch()

    def to_experts(self, rows_PD: Tensor) -> Tensor:
        """x_GCD on the experts' ranks."""
        rows = self.there(rows_PD)
        if not self.sorted_by_source:
            rows = self.reorder(rows, self.row_of_place, self.place_of_row)
        return ops.reshape(rows, self.buffers)

    def from_experts(self, y_GCD: Tensor) -> Tensor:
        """rows_PD on the tokens' ranks, in the order in which they left."""
        rows = ops.reshape(y_GCD, (-1, y_GCD.shape[2]))
        if not self.sorted_by_source:
            rows = self.reorder(rows, self.place_of_row, self.row_of_place)
        return self.back(rows)


class StaticMoELayer(ShardedMoELayer):
    """One rank's part of a sparse feed-forward network, with constant sizes."""

    def __init__(self, config: Config, context: RouterContext, exchange: Exchange, tensor: TensorGroup) -> None:
        super().__init__(config, context, exchange, tensor)
        topology = self.topology
        self.num_places, self.num_nodes, self.place_ranks = topology.num_places, topology.num_nodes, topology.tensor_parallel
        self.chunks = config.parallel.overlap_chunks
        self.num_tokens, self.features = config.micro_batch * config.model.seq_length // topology.num_places, config.model.hidden_size
        self.set_factors(config.moe.capacity)
        self._evaluated: Dict[int, SlotExchange] = {}
        self.gather = _gather(exchange)
        self.log_local = Tensor(self.log_local_E)
        self.first_neighbour, self.end_neighbour = self.node * topology.places_per_node, (self.node + 1) * topology.places_per_node

    def set_factors(self, capacity: CapacityConfig) -> None:
        """Train with the slots of these factors from now on. Raises ConfigError where the ranks of a place cannot share them evenly."""
        slots_RE = group_slots(capacity, self.topology, self.exchange.communicator.rank, self.num_tokens)
        _check_divisible(slots_RE, "parallel.overlap_chunks", self.chunks, "slots of a source for an expert")
        slots_RE = slots_RE // self.chunks
        rows_RE = slots_RE * self.topology.experts_per_rank
        _check_divisible(rows_RE, "parallel.tensor_parallel", len(self.exchange.sharers) or 1, "rows from a rank to another (exchange: groupwise)")
        self.trained = SlotExchange(self.exchange, slots_RE, self.features, self.chunks)

    def construct(
        self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor, noise: Noise, capacity: int, training: bool
    ) -> Tuple[Tensor, MoEStats]:
        """As `MoELayer.construct`, on this rank's tokens. Evaluation (not training) has a slot for every token.

        load_NE is the world's, dropped_E this rank's tokens without a slot. `capacity` is not used: a source's slots
        follow from moe.capacity.local_factor and remote_factor.
        """
        places = self.trained if training else self._for_evaluation(x_TD.shape[0], capacity)
        rows_PD, in_slot_P, slot_of_A, weight_A, cosine_T, load_E, mean_probs_E, z_loss = self.route(
            x_TD, tokens_T, domains_T, noise[0], noise[1], places.slots_E, places.start_E, places.slots, places.chunks, training
        )
        stats = self._share(load_E, mean_probs_E, x_TD.shape[0], training)
        y_PD = self._through_experts(places, rows_PD)
        y_AD = self.combine(y_PD, ops.cast(weight_A, y_PD.dtype), in_slot_P, slot_of_A)
        y_TD = dispatch.sum_choices(y_AD, self.router.choices)
        stats["z_loss"], stats["cosine_T"] = z_loss, cosine_T
        stats["dropped_E"] = ops.relu(load_E - ops.cast(places.slots_E * places.chunks, ms.float32))
        stats["weight"] = ops.reduce_sum(weight_A) * (1.0 / x_TD.shape[0])
        if self.router.choices > 1:
            stats["unrouted"] = dispatch.unrouted_share(y_TD)
        return y_TD, stats

    def _through_experts(self, places: SlotExchange, rows_PD: Tensor) -> Tensor:
        if places.chunks == 1:
            return places.from_experts(self.experts(places.to_experts(rows_PD), None))
        arrived = []
        for chunk in ops.split(rows_PD, places.slots, 0):
            arrived.append(places.to_experts(chunk))
        returned = []
        for x_GCD in arrived:
            returned.append(places.from_experts(self.experts(x_GCD, None)))
        return ops.concat(returned, 0)

    def route(
        self,
        x_TD: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
        row_keys_T: Tensor,
        column_keys_D: Tensor,
        slots_E: Tensor,
        start_E: Tensor,
        slots: int,
        chunks: int,
        training: bool,
    ) -> Tuple[Tensor, ...]:
        """Route, and put the tokens into their slots: the part before the exchange. `slots_E`, `start_E` and `slots` are a chunk's."""
        plan = self.router(ops.cast(x_TD, ms.float32), tokens_T, domains_T, (row_keys_T, column_keys_D), training)
        rank_A = dispatch.rank_within_expert(plan["one_hot_AE"], plan["affinity_A"] if self.by_affinity else None)
        expert_A = plan["expert_A"]
        width_A = ops.gather(slots_E, expert_A, 0)
        kept_A = ops.cast(ops.less(rank_A, width_A * chunks), ms.int32)
        place_A = rank_A
        if chunks > 1:  # the best tokens are in the first chunk; what was not proposed has rank -1
            chunk_A = ops.floor_div(ops.maximum(rank_A, 0), ops.maximum(width_A, 1))
            place_A = rank_A + chunk_A * (slots - width_A)
        slot_of_A = (ops.gather(start_E, expert_A, 0) + place_A + 1) * kept_A
        in_slot_P = dispatch.token_of_slot(slot_of_A, slots * chunks)
        return (
            self.dispatch(dispatch.repeat_rows(x_TD, self.router.choices), in_slot_P, slot_of_A),
            in_slot_P,
            slot_of_A,
            plan["weight_A"],
            plan["cosine_T"],
            ops.stop_gradient(ops.reduce_sum(plan["one_hot_AE"], 0)),
            ops.reduce_sum(plan["probs_TE"], 0) * (1.0 / x_TD.shape[0]),
            plan["z_loss"],
        )

    def _share(self, load_E: Tensor, mean_probs_E: Tensor, num_tokens: int, training: bool) -> MoEStats:
        """Tell the world this rank's counts and mean probabilities, and take the losses from everyone's."""
        own_X = ops.concat((load_E, ops.stop_gradient(mean_probs_E)), 0)
        shared_PX = ops.stop_gradient(self.gather(ops.stop_gradient(own_X)))
        if self.place_ranks > 1:  # the ranks of a place have the same tokens: its first one speaks for it
            shared_PX = shared_PX[:: self.place_ranks]
        load_PE = shared_PX[:, : self.num_experts]
        load_NE = ops.reduce_sum(ops.reshape(load_PE, (self.num_nodes, self.num_places // self.num_nodes, self.num_experts)), 1)
        balance, locality = ops.zeros((), ms.float32), ops.zeros((), ms.float32)
        if self.has_balance_loss:
            share_E = ops.reduce_sum(load_NE, 0)
            share_E = share_E * (1.0 / (num_tokens * self.num_places)) if self.router.choices == 1 else share_E / ops.reduce_sum(share_E)
            balance = ops.reduce_sum(share_E * mean_probs_E) * float(self.num_experts)
        if self.has_locality_loss and training and self.locality_weight > 0:
            node_PE = shared_PX[self.first_neighbour : self.end_neighbour, self.num_experts :]
            node_probs_E = ops.reduce_sum(node_PE, 0) * (1.0 / (self.end_neighbour - self.first_neighbour))
            locality = self.locality_weight * losses.locality_loss_of_rank(mean_probs_E, node_probs_E, self.log_local)
        return {"balance_loss": balance, "locality_loss": locality, "load_NE": load_NE}

    def _for_evaluation(self, num_tokens: int, capacity: int) -> SlotExchange:
        """As many slots for each expert as there are tokens; PyNative."""
        if num_tokens not in self._evaluated:
            slots_RE = np.full((len(self.exchange.ranks), self.num_experts), capacity if capacity != DROPLESS else num_tokens)
            self._evaluated[num_tokens] = SlotExchange(self.exchange, slots_RE, self.features)
        return self._evaluated[num_tokens]


def _check_divisible(numbers_RE: np.ndarray, key: str, divisor: int, what: str) -> None:
    uneven = numbers_RE[numbers_RE % divisor > 0]
    if len(uneven):
        raise ConfigError(f"{key} = {divisor}: cannot divide {int(uneven[0])} {what}; change moe.capacity.local_factor or remote_factor")


class _PyNativeGather(nn.Cell):
    """The communicator's own, for what is not compiled."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.communicator = exchange.communicator

    def construct(self, x_M: Tensor) -> Tensor:
        return self.communicator.all_gather(x_M)


def _mover(exchange: Exchange, matrix_RR: np.ndarray, features: int) -> nn.Cell:
    if isinstance(exchange.communicator, HcclOperators):
        communicator, sharers = exchange.communicator, exchange.sharers
        group = communicator.group(exchange.ranks)
        if sharers:
            own = sharers.index(communicator.rank)
            return SharedRows(group, communicator.group(sharers), features, matrix_RR, exchange.place, own, len(sharers))
        return AllToAllRows(group, features, matrix_RR[exchange.place].tolist(), matrix_RR[:, exchange.place].tolist())
    return ExchangeRows(exchange, matrix_RR)


def _gather(exchange: Exchange) -> nn.Cell:
    communicator = exchange.communicator
    if isinstance(communicator, HcclOperators):
        return GatherRows(communicator.group(range(communicator.size)))
    return _PyNativeGather(exchange)


def _rows_by_expert(width_R: np.ndarray, groups: int) -> np.ndarray:
    """For each place in [G, C] the received row: rows come by source, then by local expert."""
    first_R = np.cumsum(width_R * groups) - width_R * groups
    return np.concatenate(
        [first + group * width + np.arange(width) for group in range(groups) for first, width in zip(first_R, width_R)]
    )
