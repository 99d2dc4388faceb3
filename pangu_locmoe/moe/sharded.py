"""What the MoE layers whose experts live in several processes have in common: this rank's part, and who holds what.

An expert-parallel group has one slot for every expert, dealt to its ranks in contiguous blocks. At first expert e is in slot e;
`place` changes that, and with it who computes an expert, never what is computed.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn

from pangu_locmoe.config import Config
from pangu_locmoe.model.fused import used
from pangu_locmoe.moe import dispatch, fused, losses
from pangu_locmoe.moe.experts import Experts
from pangu_locmoe.moe.layer import expert_weights
from pangu_locmoe.moe.routers import ROUTERS
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.tensor import TensorGroup


class ShardedMoELayer(nn.Cell):
    """One rank's part of a sparse feed-forward network.

    Args:
        config: the run.
        context: what the router may know.
        exchange: the way to the ranks that share this layer's experts.
        tensor: the ranks that share each expert's matrices.
    """

    def __init__(self, config: Config, context: RouterContext, exchange: Exchange, tensor: TensorGroup) -> None:
        super().__init__()
        moe, topology = config.moe, context.topology
        self.exchange, self.topology = exchange, topology
        self.num_experts = moe.num_experts
        self.node = topology.node_of_rank(exchange.communicator.rank)
        router_class = ROUTERS[moe.router]
        self.by_affinity = moe.capacity.drop_order == "affinity" and router_class.has_gate
        self.has_balance_loss, self.has_locality_loss = router_class.has_balance_loss, router_class.has_locality_loss
        self.router = router_class(config, context)
        # The router's own locality loss is for one process that holds the tokens of all nodes; this layer has one for its rank.
        self.router.has_locality = False
        self.held_slots = topology.experts_of_rank(exchange.communicator.rank)
        self.experts = Experts(*expert_weights(config, context.layer, self.held_slots), tensor)
        self.fused = used(config) and config.parallel.sizes == "counts"
        self.dispatch: nn.Cell = fused.PermuteTokens() if self.fused else dispatch.Dispatch()
        self.combine: nn.Cell = fused.UnpermuteTokens() if self.fused else dispatch.Combine()
        self.place(np.arange(moe.num_experts))
        # The locality loss is a mean over the nodes that hold experts, and ranks are averaged over all nodes. Its target is where
        # experts are at first: a loss that followed them would make placement change what is learned.
        local_NE = topology.local_NE
        holders = local_NE.any(axis=1)
        self.locality_weight = float(holders[self.node]) * topology.num_nodes / max(1, int(holders.sum())) if topology.num_nodes > 1 else 0.0
        self.log_local_E = np.log(losses.local_distribution(local_NE, moe.locality_smoothing))[self.node]

    def place(self, expert_of_slot_E: np.ndarray) -> None:
        """Say which expert each slot holds, int [E], a permutation. Weights are not touched: `train.step.moving` moves them."""
        self.expert_of_slot_E = expert_of_slot_E
        # An argument of the compiled part, because an attribute would be a constant of it.
        self.slot_of_expert_E = Tensor(np.argsort(expert_of_slot_E).astype(np.int32))

    @property
    def held_experts(self) -> np.ndarray:
        """The experts on this rank in the order of its weights, int [E / R]."""
        return self.expert_of_slot_E[self.held_slots.start : self.held_slots.stop]
