"""Everything in this process, which may stand for several nodes: rows go into their experts'
buffers.

Letters: T tokens, A assignments (moe/plan.py), D hidden, E experts, G groups of C slots, Q = G*C
slots, N nodes.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np
from mindspore import Tensor, ops

from pangu_locmoe.config import Config
from pangu_locmoe.moe import dispatch
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.experts import Experts
from pangu_locmoe.moe.losses import log_of
from pangu_locmoe.moe.plan import RoutingPlan, Shared
from pangu_locmoe.moe.transport.base import Packed, Transport
from pangu_locmoe.parallel.topology import Topology


class LocalTransport(Transport):
    """The tokens of all nodes and all experts are here: N equal contiguous runs of tokens, one a
    node.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        super().__init__(config, topology)
        self.nodes_here = topology.num_nodes

    @property
    def held_experts(self) -> np.ndarray:
        """All, in order."""
        return np.arange(self.num_experts)

    def layout(self, num_tokens: int, capacity: int, training: bool) -> Tuple[Tensor, int]:
        return None, capacity

    def pack(
        self,
        x_AD: Tensor,
        plan: RoutingPlan,
        load_E: Tensor,
        layout: Tensor,
        room: int,
        training: bool,
    ) -> Packed:
        """Also dropped_E, and expert_of_group_G where every token finds room."""
        groups, slots = self._groups(x_AD.shape[0], room)
        if room == DROPLESS:
            position_A = dispatch.position_within_expert(plan["one_hot_AE"], None)
            slot_of_row_A, expert_of_group_G = dispatch.block_slots(
                plan["expert_A"], position_A, load_E
            )
            row_of_slot_Q = dispatch.row_of_slot(slot_of_row_A, groups * slots)
            return {
                "rows_QD": self.dispatch(x_AD, row_of_slot_Q, slot_of_row_A),
                "row_of_slot_Q": row_of_slot_Q,
                "slot_of_row_A": slot_of_row_A,
                "expert_of_group_G": expert_of_group_G,
                "dropped_E": ops.zeros_like(load_E),
            }
        affinity_A = plan["affinity_A"] if self.by_affinity else None
        position_A = dispatch.position_within_expert(plan["one_hot_AE"], affinity_A)
        slot_of_row_A = dispatch.capacity_slots(plan["expert_A"], position_A, room)
        row_of_slot_Q = dispatch.row_of_slot(slot_of_row_A, groups * slots)
        return {
            "rows_QD": self.dispatch(x_AD, row_of_slot_Q, slot_of_row_A),
            "row_of_slot_Q": row_of_slot_Q,
            "slot_of_row_A": slot_of_row_A,
            "dropped_E": ops.relu(load_E - float(room)),
        }

    def share(self, own_load_NE: Tensor, own_probs_NE: Tensor) -> Shared:
        return {
            "load_NE": own_load_NE,
            "probs_NE": own_probs_NE,
            "log_probs_NE": log_of(own_probs_NE),
        }

    def total(self, counts_M: Tensor) -> Tensor:
        return counts_M

    def with_own_gradient(self, probs_NE: Tensor, own_probs_NE: Tensor) -> Tensor:
        return own_probs_NE

    def carry(
        self, experts: Experts, packed: Packed, shared: Shared, capacity: int, training: bool
    ) -> Tuple[Tensor, Tensor]:
        rows_QD = packed["rows_QD"]
        groups, slots = self._groups(packed["slot_of_row_A"].shape[0], capacity)
        x_GCD = ops.reshape(rows_QD, (groups, slots, rows_QD.shape[1]))
        expert_of_group_G = packed["expert_of_group_G"] if capacity == DROPLESS else None
        y_GCD = experts(x_GCD, expert_of_group_G)
        return ops.reshape(y_GCD, rows_QD.shape), packed["dropped_E"]

    def _groups(self, num_assignments: int, capacity: int) -> Tuple[int, int]:
        """G and C."""
        if capacity != DROPLESS:
            return self.num_experts, capacity
        blocks = dispatch.num_blocks(num_assignments, self.num_experts)
        return blocks, dispatch.block_size(num_assignments, self.num_experts)
