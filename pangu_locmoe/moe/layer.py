"""The MoE layer: router -> plan -> dispatch -> experts -> combine.

Letters: T tokens, A assignments (moe/plan.py; most routers: A = T), D hidden, E experts, N source nodes, G groups, C slots in
a group.
"""

from __future__ import annotations

from typing import Dict, Optional, Tuple

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common import dtype as mstype

from pangu_locmoe.config import Config
from pangu_locmoe.model.init import normal
from pangu_locmoe.moe import dispatch
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.experts import Experts
from pangu_locmoe.moe.routers import ROUTERS
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.noise import Noise
from pangu_locmoe.parallel.tensor import TensorGroup

MoEStats = Dict[str, Tensor]


class MoELayer(nn.Cell):
    """A sparse feed-forward network: y = weight * expert(x) summed over a token's experts, most often one; 0 where it is dropped."""

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__()
        moe = config.moe
        self.num_experts = moe.num_experts
        self.num_nodes = context.topology.num_nodes
        self.by_affinity = moe.capacity.drop_order == "affinity" and ROUTERS[moe.router].has_gate
        self.router = ROUTERS[moe.router](config, context)
        self.experts = Experts(*expert_weights(config, context.layer), TensorGroup.alone())
        self.unit_weight = False  # while inheriting: experts that are all alike then equal the dense network
        self.dispatch, self.combine = dispatch.Dispatch(), dispatch.Combine()

    @property
    def held_experts(self) -> np.ndarray:
        """All experts, in order."""
        return np.arange(self.num_experts)

    def construct(
        self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor, noise: Noise, capacity: int, training: bool
    ) -> Tuple[Tensor, MoEStats]:
        """Route, compute, combine.

        Args:
            x_TD: LayerNormed hidden states; while training, N equal contiguous runs of tokens, one for each source node.
            tokens_T, domains_T: token and domain ids, int32.
            noise: keys of this step's randomness.
            capacity: slots for each expert, or DROPLESS; a constant of the compiled graph.
            training: whether this is training; a constant of the compiled graph.

        Returns:
            y_TD, and a dict of: balance_loss, locality_loss, z_loss, weight (of a token's experts together, mean over tokens; fp32 scalars),
            load_NE (assignments by source node and expert before drops, fp32; one node when not training), dropped_E (of them, fp32),
            cosine_T (fp32), and with several experts for a token `unrouted`, the share of tokens without any (fp32 scalar).
        """
        num_tokens, hidden_size = x_TD.shape
        plan = self.router(ops.cast(x_TD, mstype.float32), tokens_T, domains_T, noise, training)
        choices, num_assignments = self.router.choices, num_tokens * self.router.choices
        affinity_A = plan["affinity_A"] if self.by_affinity and capacity != DROPLESS else None
        rank_A = dispatch.rank_within_expert(plan["one_hot_AE"], affinity_A)
        num_nodes = self.num_nodes if training else 1
        load_NE = ops.reduce_sum(ops.reshape(plan["one_hot_AE"], (num_nodes, num_assignments // num_nodes, self.num_experts)), 1)
        load_E = ops.reduce_sum(load_NE, 0)

        expert_of_group_G = None
        if capacity == DROPLESS:
            slot_of_A, expert_of_group_G = dispatch.block_slots(plan["expert_A"], rank_A, load_E)
            groups = (dispatch.num_blocks(num_assignments, self.num_experts), dispatch.block_size(num_assignments, self.num_experts), hidden_size)
            dropped_E = ops.zeros_like(load_E)
        else:
            slot_of_A = dispatch.capacity_slots(plan["expert_A"], rank_A, capacity)
            groups = (self.num_experts, capacity, hidden_size)
            dropped_E = ops.relu(load_E - float(capacity))

        in_slot_P = dispatch.token_of_slot(slot_of_A, groups[0] * groups[1])
        x_GCD = ops.reshape(self.dispatch(dispatch.repeat_rows(x_TD, choices), in_slot_P, slot_of_A), groups)
        y_GCD = self.experts(x_GCD, expert_of_group_G)
        weight_A = ops.cast(self._unit(plan["weight_A"]) if self.unit_weight else plan["weight_A"], y_GCD.dtype)
        y_AD = self.combine(ops.reshape(y_GCD, (-1, hidden_size)), weight_A, in_slot_P, slot_of_A)
        y_TD = dispatch.sum_choices(y_AD, choices)
        stats = {
            "balance_loss": plan["balance_loss"],
            "locality_loss": plan["locality_loss"],
            "z_loss": plan["z_loss"],
            "weight": ops.reduce_sum(plan["weight_A"]) * (1.0 / num_tokens),
            "load_NE": load_NE,
            "dropped_E": dropped_E,
            "cosine_T": plan["cosine_T"],
        }
        if choices > 1:
            stats["unrouted"] = dispatch.unrouted_share(y_TD)
        return y_TD, stats

    def _unit(self, weight_A: Tensor) -> Tensor:
        """Weights that are 1 for each token's experts together."""
        choices = self.router.choices
        if choices == 1:
            return ops.ones_like(weight_A)
        weight_TK = ops.reshape(weight_A, (-1, choices))
        return ops.reshape(weight_TK / ops.ReduceSum(keep_dims=True)(weight_TK, 1), (-1,))


def expert_weights(config: Config, layer: int, experts: Optional[range] = None) -> Tuple[np.ndarray, np.ndarray]:
    """Initial weights fp32 [E, D, F] and [E, F, D]: those of one expert depend on its global id only, not on who holds it.

    Args:
        config: the run.
        layer: index among the MoE layers.
        experts: only these; None: all.
    """
    model = config.model
    out_std = model.init_std / (2 * model.num_layers) ** 0.5
    seeds = [[config.train.seed, 3, layer, expert] for expert in experts or range(config.moe.num_experts)]
    w_in_EDF = np.stack([normal([*seed, 0], (model.hidden_size, model.ffn_size), model.init_std) for seed in seeds])
    w_out_EFD = np.stack([normal([*seed, 1], (model.ffn_size, model.hidden_size), out_std) for seed in seeds])
    return w_in_EDF, w_out_EFD
