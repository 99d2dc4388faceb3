"""The transport by which exactly the routed tokens travel between ranks.

An expert sees the tokens of all sources in its group and keeps the best of them, so what is dropped
does not depend on the number of processes. The exchange runs in PyNative, because its sizes follow
the routing; `pack`, which lies before it, is compiled.

Letters: A assignments of this rank's tokens (moe/plan.py), D hidden, E experts, P their slots in
the group, R ranks of the expert-parallel group, M rows received, N nodes, G local experts, C tokens
an expert keeps, Q = G*C token slots, U replicas of the world.
"""

from __future__ import annotations

from typing import Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from pangu_locmoe.config import Config
from pangu_locmoe.moe import dispatch, fused
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.experts import Experts
from pangu_locmoe.moe.plan import RoutingPlan, Shared
from pangu_locmoe.moe.transport.base import Packed, RankTransport
from pangu_locmoe.nn.flash_attention import used
from pangu_locmoe.parallel.exchange import Exchange, ExchangeRows
from pangu_locmoe.parallel.topology import Topology


class CountsTransport(RankTransport):
    """Rows leave sorted by their expert's slot, and as many travel as there are."""

    packed_names = (*RankTransport.packed_names, "affinity_A")

    def __init__(self, config: Config, topology: Topology, exchange: Exchange) -> None:
        super().__init__(config, topology, exchange)
        self.fused = used(config)
        if self.fused:
            self.dispatch = fused.PermuteTokens()
            self.combine = fused.UnpermuteTokens()
        self.group = [topology.replica_of_rank(rank) for rank in exchange.ranks]

    def layout(self, num_tokens: int, capacity: int, training: bool) -> Tuple[Tensor, int]:
        return self.slot_of_expert_E, 0

    def pack(
        self,
        x_AD: Tensor,
        plan: RoutingPlan,
        load_E: Tensor,
        layout: Tensor,
        room: int,
        training: bool,
    ) -> Packed:
        """Also affinity_A, sorted as the rows are.

        What was not proposed is last, and has no slot.
        """
        # The sort is stable: within an expert, tokens keep the order of the batch.
        slot_A = ops.cast(ops.gather(layout, plan["expert_A"], 0), ms.float32)
        proposed_A = ops.ones_like(slot_A)
        if self.choices > 1:
            proposed_A = ops.reduce_sum(plan["one_hot_AE"], 1)
            slot_A = slot_A + float(self.num_experts) * (1.0 - proposed_A)
        order_A = ops.cast(ops.sort(slot_A)[1], ms.int32)
        row_of_slot_A = order_A + 1
        slot_of_row_A = dispatch.row_of_slot(row_of_slot_A, order_A.shape[0])
        if self.choices > 1:
            slot_of_row_A = slot_of_row_A * ops.cast(proposed_A, ms.int32)
        return {
            "rows_QD": self.dispatch(x_AD, row_of_slot_A, slot_of_row_A),
            "row_of_slot_Q": row_of_slot_A,
            "slot_of_row_A": slot_of_row_A,
            "affinity_A": ops.gather(plan["affinity_A"], order_A, 0),
        }

    def share(self, own_load_NE: Tensor, own_probs_NE: Tensor) -> Shared:
        own_2E = ops.concat((own_load_NE, ops.stop_gradient(own_probs_NE)), 0)
        # The ranks of a replica have the same tokens: its first one speaks for it.
        shared_U2E = self.exchange.communicator.all_gather(own_2E).asnumpy()
        shared_U2E = shared_U2E[:: self.topology.tensor_parallel]
        counts_UE = shared_U2E[:, 0].astype(np.int64)
        by_node = (self.topology.num_nodes, -1, self.num_experts)
        probs_NE = shared_U2E[:, 1].reshape(by_node).mean(axis=1)
        return {
            "load_NE": Tensor(counts_UE.reshape(by_node).sum(axis=1).astype(np.float32)),
            "probs_NE": Tensor(probs_NE),
            # NumPy's: in PyNative, MindSpore tries ways to share a logarithm out over threads, and
            # they differ in the last bit.
            "log_probs_NE": Tensor(np.log(probs_NE + np.float32(1e-20))),
            "counts_UE": counts_UE,
        }

    def carry(
        self, experts: Experts, packed: Packed, shared: Shared, capacity: int, training: bool
    ) -> Tuple[Tensor, Tensor]:
        counts_RP = shared["counts_UE"][self.group][:, self.expert_of_slot_P]
        sent_RR = counts_RP.reshape(len(self.group), len(self.group), -1).sum(axis=2)
        rows_AD = packed["rows_QD"]
        affinity_A = packed["affinity_A"]
        if self.choices > 1:  # what was not proposed is last, and stays
            proposed = int(sent_RR[self.exchange.position].sum())
            rows_AD, affinity_A = rows_AD[:proposed], affinity_A[:proposed]
        rows_MD = ExchangeRows(self.exchange, sent_RR)(rows_AD)
        affinity_M = None
        if self.by_affinity and capacity != DROPLESS:
            affinity_M1 = self.exchange.move(ops.expand_dims(affinity_A, 1), sent_RR)
            affinity_M = affinity_M1.asnumpy()[:, 0]
        counts_RG = counts_RP[:, self.held_slots.start : self.held_slots.stop]
        slot_of_row_M, slots, dropped_G = assign_slots(counts_RG, affinity_M, capacity)
        # A rank to which no token came has no rows to compute; its part in the exchange is the
        # same.
        y_MD = self._apply(experts, rows_MD, slot_of_row_M, slots) if slots else rows_MD
        dropped_E = np.zeros(self.num_experts, dtype=np.float32)
        dropped_E[self.held_experts] = dropped_G
        return ExchangeRows(self.exchange, sent_RR.T)(y_MD), Tensor(dropped_E)

    def unpack(self, y_QD: Tensor, weight_A: Tensor, packed: Packed) -> Tensor:
        if self.choices > 1:  # without what stayed
            packed = {**packed, "row_of_slot_Q": packed["row_of_slot_Q"][: y_QD.shape[0]]}
        return super().unpack(y_QD, weight_A, packed)

    def _apply(
        self, experts: Experts, rows_MD: Tensor, slot_of_row_M: np.ndarray, slots: int
    ) -> Tensor:
        if self.fused:
            return fused.apply_grouped(experts, rows_MD, slot_of_row_M, slots)
        num_groups = self.topology.experts_per_rank
        hidden_size = rows_MD.shape[1]
        row_of_slot_Q = np.zeros(num_groups * slots + 1, dtype=np.int32)
        row_of_slot_Q[slot_of_row_M] = np.arange(1, len(slot_of_row_M) + 1)
        row_of_slot = Tensor(row_of_slot_Q[1:])
        slot_of_row = Tensor(slot_of_row_M)
        x_QD = self.dispatch(rows_MD, row_of_slot, slot_of_row)
        x_GCD = ops.reshape(x_QD, (num_groups, slots, hidden_size))
        y_QD = ops.reshape(experts(x_GCD, None), (-1, hidden_size))
        return self.dispatch(y_QD, slot_of_row, row_of_slot)


def assign_slots(
    counts_RG: np.ndarray, affinity_M: np.ndarray | None, capacity: int
) -> Tuple[np.ndarray, int, np.ndarray]:
    """Which slot each received row takes.

    Rows come sorted by source rank, then by local expert, then by position. An expert keeps the
    rows of the highest affinity, ties by source and position, which is the order of the whole
    batch.

    Args:
        counts_RG: rows from each source for each local expert.
        affinity_M: fp32; None: by position.
        capacity: the most rows an expert keeps, or DROPLESS.

    Returns:
        one-based slots int32 [M], 0 for a dropped row; slots of each expert (as many as the fullest
        needs); the number of rows each local expert drops, int [G].
    """
    num_groups = counts_RG.shape[1]
    expert_M = np.repeat(np.tile(np.arange(num_groups), len(counts_RG)), counts_RG.reshape(-1))
    load_G = counts_RG.sum(axis=0)
    keep = int(load_G.max()) if capacity == DROPLESS else min(capacity, int(load_G.max()))
    keys = (expert_M,) if affinity_M is None else (-affinity_M, expert_M)
    order_M = np.lexsort(keys)  # stable: ties keep the order of the batch
    first_G = np.cumsum(load_G) - load_G
    rank_M = np.empty(len(expert_M), dtype=np.int64)
    rank_M[order_M] = np.arange(len(expert_M)) - first_G[expert_M[order_M]]
    slot_M = np.where(rank_M < keep, expert_M * keep + rank_M + 1, 0).astype(np.int32)
    return slot_M, keep, np.maximum(load_G - keep, 0)
