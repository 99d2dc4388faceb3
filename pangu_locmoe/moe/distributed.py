"""The MoE layer whose experts live in several processes: route -> exchange -> experts -> exchange back -> combine.

Exactly the routed tokens travel. An expert sees the tokens of all sources in its group and keeps the best of them, so
what is dropped does not depend on the number of processes. The exchange runs in PyNative, because its sizes follow the
routing; what lies before it is compiled.

Letters: T tokens of this rank, A their assignments (moe/plan.py; most routers: A = T), D hidden, E experts (and as many slots of
the group, in S), R ranks of the expert-parallel group, M rows received, N nodes, G local experts, C tokens an expert keeps,
P = G*C slots (places of the world in counts_PE).
"""

from __future__ import annotations

from typing import Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from pangu_locmoe.moe import dispatch, losses
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.fused import apply_grouped
from pangu_locmoe.moe.layer import MoEStats
from pangu_locmoe.moe.sharded import ShardedMoELayer
from pangu_locmoe.noise import Noise
from pangu_locmoe.parallel.exchange import ExchangeRows


class DistributedMoELayer(ShardedMoELayer):
    """One rank's part of a sparse feed-forward network; exactly the routed tokens travel."""

    def construct(
        self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor, noise: Noise, capacity: int, training: bool
    ) -> Tuple[Tensor, MoEStats]:
        """As `MoELayer.construct`, on this rank's tokens; load_NE is the world's, dropped_E that of this rank's experts."""
        rows_AD, in_place_A, place_of_A, affinity_A, weight_A, cosine_T, load_E, mean_probs_E, z_loss = self.route(
            x_TD, tokens_T, domains_T, noise[0], noise[1], self.slot_of_expert_E, training
        )
        counts_PE, stats = self._share(load_E, mean_probs_E, training)
        group = [self.topology.place_of_rank(rank) for rank in self.exchange.ranks]
        counts_RS = counts_PE[group][:, self.expert_of_slot_E]
        sent_RR = counts_RS.reshape(len(group), len(group), -1).sum(axis=2)
        if self.router.choices > 1:  # what was not proposed is last, and stays
            proposed = int(sent_RR[self.exchange.place].sum())
            rows_AD, in_place_A, affinity_A = rows_AD[:proposed], in_place_A[:proposed], affinity_A[:proposed]
        rows_MD = ExchangeRows(self.exchange, sent_RR)(rows_AD)
        affinity_M = None
        if self.by_affinity and capacity != DROPLESS:
            affinity_M = self.exchange.move(ops.expand_dims(affinity_A, 1), sent_RR).asnumpy()[:, 0]
        slot_of_row_M, slots, dropped_G = assign_slots(counts_RS[:, self.held_slots.start : self.held_slots.stop], affinity_M, capacity)
        # A rank to which no token came has no rows to compute; its part in the exchange is the same.
        y_MD = self._apply_experts(rows_MD, slot_of_row_M, slots) if slots else rows_MD
        y_sorted_AD = ExchangeRows(self.exchange, sent_RR.T)(y_MD)
        y_AD = self.combine(y_sorted_AD, ops.cast(weight_A, y_sorted_AD.dtype), in_place_A, place_of_A)
        y_TD = dispatch.sum_choices(y_AD, self.router.choices)
        stats["z_loss"], stats["cosine_T"] = z_loss, cosine_T
        stats["dropped_E"] = _spread(dropped_G, self.held_experts, self.num_experts)
        stats["weight"] = ops.reduce_sum(weight_A) * (1.0 / x_TD.shape[0])
        if self.router.choices > 1:
            stats["unrouted"] = dispatch.unrouted_share(y_TD)
        return y_TD, stats

    def route(
        self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor, row_keys_T: Tensor, column_keys_D: Tensor, slot_of_expert_E: Tensor, training: bool
    ) -> Tuple[Tensor, ...]:
        """Route, and sort the assignments by their expert's slot: the part before the exchange, which is compiled.

        Returns:
            the sorted rows_AD, the maps in_place_A and place_of_A between the two orders (one-based; place 0 for what was
            not proposed, which is sorted last), the sorted affinity_A, then weight_A and cosine_T in the old order, load_E,
            mean_probs_E and z_loss.
        """
        plan = self.router(ops.cast(x_TD, ms.float32), tokens_T, domains_T, (row_keys_T, column_keys_D), training)
        # The sort is stable: within an expert, tokens keep the order of the batch.
        slot_A = ops.cast(ops.gather(slot_of_expert_E, plan["expert_A"], 0), ms.float32)
        proposed_A = ops.ones_like(slot_A)
        if self.router.choices > 1:
            proposed_A = ops.reduce_sum(plan["one_hot_AE"], 1)
            slot_A = slot_A + float(self.num_experts) * (1.0 - proposed_A)
        order_A = ops.cast(ops.sort(slot_A)[1], ms.int32)
        in_place_A = order_A + 1
        place_of_A = dispatch.token_of_slot(in_place_A, order_A.shape[0])
        if self.router.choices > 1:
            place_of_A = place_of_A * ops.cast(proposed_A, ms.int32)
        return (
            self.dispatch(dispatch.repeat_rows(x_TD, self.router.choices), in_place_A, place_of_A),
            in_place_A,
            place_of_A,
            ops.gather(plan["affinity_A"], order_A, 0),
            plan["weight_A"],
            plan["cosine_T"],
            ops.stop_gradient(ops.reduce_sum(plan["one_hot_AE"], 0)),
            ops.reduce_sum(plan["probs_TE"], 0) * (1.0 / x_TD.shape[0]),
            plan["z_loss"],
        )

    def _share(self, load_E: Tensor, mean_probs_E: Tensor, training: bool) -> Tuple[np.ndarray, MoEStats]:
        """Tell the world this rank's counts and mean probabilities; returns all places' counts int [P, E] and the losses."""
        own_2E = ops.concat((load_E, ops.stop_gradient(mean_probs_E)), 0)
        # The ranks of a place have the same tokens: its first one speaks for it.
        shared = self.exchange.communicator.all_gather(own_2E).asnumpy()[:: self.topology.tensor_parallel]
        counts_PE = shared[:, : self.num_experts].astype(np.int64)
        zero = ops.zeros((), ms.float32)
        stats = {"balance_loss": zero, "locality_loss": zero}
        if self.has_balance_loss:
            share_E = Tensor((counts_PE.sum(axis=0) / counts_PE.sum()).astype(np.float32))
            stats["balance_loss"] = ops.reduce_sum(share_E * mean_probs_E) * float(self.num_experts)
        if self.has_locality_loss and training and self.locality_weight > 0:
            probs_NE = shared[:, self.num_experts :].reshape(self.topology.num_nodes, -1, self.num_experts).mean(axis=1)
            # NumPy's logarithm: in PyNative, MindSpore tries ways to share one out over threads, and they differ in the last bit.
            log_ratio_E = np.log(probs_NE[self.node] + np.float32(1e-20)) - self.log_local_E
            stats["locality_loss"] = self.locality_weight * losses.divergence_of_rank(mean_probs_E, Tensor(probs_NE[self.node]), Tensor(log_ratio_E))
        nodes = self.topology.num_nodes
        stats["load_NE"] = Tensor(counts_PE.reshape(nodes, -1, self.num_experts).sum(axis=1).astype(np.float32))
        return counts_PE, stats

    def _apply_experts(self, rows_MD: Tensor, slot_of_row_M: np.ndarray, slots: int) -> Tensor:
        if self.fused:
            return apply_grouped(self.experts, rows_MD, slot_of_row_M, slots)
        num_groups, hidden_size = self.topology.experts_per_rank, rows_MD.shape[1]
        row_of_slot_P = np.zeros(num_groups * slots + 1, dtype=np.int32)
        row_of_slot_P[slot_of_row_M] = np.arange(1, len(slot_of_row_M) + 1)
        row_of_slot, slot_of_row = Tensor(row_of_slot_P[1:]), Tensor(slot_of_row_M)
        x_GCD = ops.reshape(self.dispatch(rows_MD, row_of_slot, slot_of_row), (num_groups, slots, hidden_size))
        y_PD = ops.reshape(self.experts(x_GCD, None), (-1, hidden_size))
        return self.dispatch(y_PD, slot_of_row, row_of_slot)


def assign_slots(counts_RG: np.ndarray, affinity_M: np.ndarray | None, capacity: int) -> Tuple[np.ndarray, int, np.ndarray]:
    """Which slot each received row takes.

    Rows come sorted by source rank, then by local expert, then by position. An expert keeps the rows of the highest
    affinity, ties by source and position, which is the order of the whole batch.

    Args:
        counts_RG: rows from each source for each local expert.
        affinity_M: fp32; None: by position.
        capacity: the most rows an expert keeps, or DROPLESS.

    Returns:
        one-based slots int32 [M], 0 for a dropped row; slots of each expert (as many as the fullest needs); the number
        of rows each local expert drops, int [G].
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


def _spread(values_G: np.ndarray, held: np.ndarray, num_experts: int) -> Tensor:
    values_E = np.zeros(num_experts, dtype=np.float32)
    values_E[held] = values_G
    return Tensor(values_E)
