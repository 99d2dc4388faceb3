"""What a transport is: the way of rows to experts and back, and what the ranks tell each other.

    pack -> carry (there, experts, back) -> unpack
    share

`pack` is compiled in every job. With slots and in one process so is the rest; with counts the rest
runs in PyNative, because its sizes follow the routing.

Letters: T tokens of this process, A their assignments (moe/plan.py; most routers: A = T), D hidden,
E experts, Q token slots (rows that leave), P expert slots, N nodes of the job (own_*_NE: those
whose tokens this process has).
"""

from __future__ import annotations

from typing import ClassVar, Dict, Tuple

import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.config import Config
from pangu_locmoe.moe import dispatch
from pangu_locmoe.moe.experts import Experts
from pangu_locmoe.moe.plan import RoutingPlan, Shared
from pangu_locmoe.moe.routers import router_class
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.topology import Topology

Packed = Dict[str, Tensor]
"""Rows on their way: rows_QD, the one-based maps row_of_slot_Q and slot_of_row_A
(moe/dispatch.py), and what a transport adds for itself.
"""


class Transport(nn.Cell):
    """Moves rows between tokens and experts. It has no weights.

    packed_names: what `pack` returns, where it may be compiled alone.

    Args:
        config: the run.
        topology: which node holds which expert.
    """

    packed_names: ClassVar[Tuple[str, ...]] = ("rows_QD", "row_of_slot_Q", "slot_of_row_A")

    def __init__(self, config: Config, topology: Topology) -> None:
        super().__init__()
        router = router_class(config)
        self.topology = topology
        self.num_experts = config.moe.num_experts
        self.choices = router.max_choices(config)
        # Without a gate all affinities are alike, and a stable sort by them is a waste.
        self.by_affinity = config.moe.capacity.drop_order == "affinity" and router.traits.has_gate
        self.dispatch: nn.Cell = dispatch.Dispatch()
        self.combine: nn.Cell = dispatch.Combine()
        self.nodes_here = 1
        """Nodes whose tokens this process has while training; otherwise tokens have no node, and it
        is 1.
        """

    @property
    def held_experts(self) -> np.ndarray:
        """The experts of this process in the order of its weights, int."""
        raise NotImplementedError

    def layout(self, num_tokens: int, capacity: int, training: bool) -> Tuple[Tensor, int]:
        """What `pack` goes by, and may change between steps: a tensor, and a constant of its graph.

        They are arguments of the compiled part, because an attribute would be a constant of it.
        """
        raise NotImplementedError

    def pack(
        self,
        x_AD: Tensor,
        plan: RoutingPlan,
        load_E: Tensor,
        layout: Tensor,
        room: int,
        training: bool,
    ) -> Packed:
        """Put rows into the order in which they leave.

        Args:
            x_AD: a row for each assignment.
            plan, load_E: the router's, and the assignments that it counts for each expert.
            layout, room: from `layout`.
            training: a constant of the graph.
        """
        raise NotImplementedError

    def share(self, own_load_NE: Tensor, own_probs_NE: Tensor) -> Shared:
        """Tell everyone this process's counts and mean probabilities by node, and learn theirs.

        Nothing of it has a gradient: see `with_own_gradient`.
        """
        raise NotImplementedError

    def total(self, counts_M: Tensor) -> Tensor:
        """The sum of counts over all tokens of the job, integers in fp32."""
        raise NotImplementedError

    def with_own_gradient(self, probs_NE: Tensor, own_probs_NE: Tensor) -> Tensor:
        """Everyone's means with the gradient of this process's, see `plan.Shared`."""
        raise NotImplementedError

    def carry(
        self, experts: Experts, packed: Packed, shared: Shared, capacity: int, training: bool
    ) -> Tuple[Tensor, Tensor]:
        """Bring packed rows to their experts, apply these, and bring them back.

        Args:
            experts: those of `held_experts`.
            packed: from `pack`.
            shared: from `share`.
            capacity: the most rows that an expert keeps, or DROPLESS.
            training: a constant of the graph.

        Returns:
            y_QD in the order in which rows left; the assignments to each expert that were dropped,
            as far as this process knows of them (over all ranks they add up), fp32 [E].
        """
        raise NotImplementedError

    def unpack(self, y_QD: Tensor, weight_A: Tensor, packed: Packed) -> Tensor:
        """y_AD: weight times each assignment's row, zero where it was dropped."""
        weight_A = ops.cast(weight_A, y_QD.dtype)
        return self.combine(y_QD, weight_A, packed["row_of_slot_Q"], packed["slot_of_row_A"])


class RankTransport(Transport):
    """What transports between ranks have in common: this rank's part, and who holds what.

    An expert-parallel group has one slot for every expert, dealt to its ranks in contiguous blocks.
    At first expert e is in slot e; `set_placement` changes that, and with it who computes an
    expert, never what.

    Args:
        config, topology: as for `Transport`.
        exchange: the way to the ranks that share this layer's experts.
    """

    def __init__(self, config: Config, topology: Topology, exchange: Exchange) -> None:
        super().__init__(config, topology)
        self.exchange = exchange
        rank = exchange.communicator.rank
        self.held_slots = topology.experts_of_rank(rank)
        self.set_placement(np.arange(self.num_experts))
        own_N1 = np.zeros((topology.num_nodes, 1), np.float32)
        own_N1[topology.node_of_rank(rank)] = topology.num_nodes
        self.own_N1 = Tensor(own_N1)
        if config.moe.balance == "quantile":
            # The ranks of a replica have the same tokens: one of each counts.
            self.sum = exchange.communicator.summing(topology.same_part(rank))

    def set_placement(self, expert_of_slot_P: np.ndarray) -> None:
        """Say which expert each slot holds, int [P], a permutation; weights are not touched."""
        self.expert_of_slot_P = expert_of_slot_P
        self.slot_of_expert_E = Tensor(np.argsort(expert_of_slot_P).astype(np.int32))

    @property
    def held_experts(self) -> np.ndarray:
        return self.expert_of_slot_P[self.held_slots.start : self.held_slots.stop]

    def total(self, counts_M: Tensor) -> Tensor:
        return self.sum(counts_M)

    def with_own_gradient(self, probs_NE: Tensor, own_probs_NE: Tensor) -> Tensor:
        # A node's mean is one over its replicas' number times their sum, and gradients are averaged
        # over all replicas: what is left between the two is the number of nodes.
        return probs_NE + self.own_N1 * (own_probs_NE - ops.stop_gradient(own_probs_NE))
