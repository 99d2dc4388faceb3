"""The MoE layer: router -> transport -> experts -> transport back.

Letters: T tokens of this process, A assignments (moe/plan.py; most routers: A = T), D hidden, E
experts, Q token slots (rows that travel), N source nodes of the job (own_*_NE: those whose tokens
this process has).
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.common import dtype as mstype

from pangu_locmoe.config import Config
from pangu_locmoe.moe import dispatch
from pangu_locmoe.moe.experts import Experts, expert_weights
from pangu_locmoe.moe.plan import LOSSES, Shared
from pangu_locmoe.moe.routers import Router, router_class
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.moe.transport import Packed, Transport, make_transport
from pangu_locmoe.nn.noise import Noise
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.tensor import TensorGroup

MoEStats = Dict[str, Tensor]
ROUTED = ("weight_A", "cosine_T", "own_load_NE", "own_probs_NE")


class MoELayer(nn.Cell):
    """A sparse feed-forward network: y = weight * expert(x), summed over a token's experts.

    Most often that is one expert; y is 0 where a token is dropped.

    Args:
        router: which expert a token has, and what that costs.
        transport: the way to the experts and back.
        experts: those that the transport holds in this process.
    """

    def __init__(self, router: Router, transport: Transport, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.transport = transport
        self.experts = experts
        self.balances = router.balancer is not None
        # While inheriting: experts that are all alike then equal the dense network.
        self.unit_weight = False

    @classmethod
    def of(
        cls,
        config: Config,
        context: RouterContext,
        exchange: Optional[Exchange] = None,
        tensor: Optional[TensorGroup] = None,
    ) -> MoELayer:
        """The layer of a run.

        Args:
            config: the run.
            context: what the router may know.
            exchange: the way to the ranks that share this layer's experts; None: all are here.
            tensor: the ranks that share each expert's matrices; None: this one has them to itself.
        """
        transport = make_transport(config, context.topology, exchange)
        weights = expert_weights(config, context.layer, transport.held_experts)
        experts = Experts(*weights, tensor or TensorGroup.alone())
        return cls(router_class(config)(config, context), transport, experts)

    def construct(
        self,
        x_TD: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
        noise: Noise,
        capacity: int,
        training: bool,
    ) -> Tuple[Tensor, MoEStats]:
        """Route, compute, combine.

        Args:
            x_TD: LayerNormed hidden states; while training, equal contiguous runs of tokens, one
                for each node whose tokens are here.
            tokens_T, domains_T: token and domain ids, int32.
            noise: keys of this step's randomness.
            capacity: rows that an expert keeps, or DROPLESS; a constant of the compiled graph. Of
                no account while training with constant sizes, where sources have slots
                (transport/slots.py).
            training: whether this is training; a constant of the compiled graph.

        Returns:
            y_TD, and a dict of: balance_loss, locality_loss, z_loss, weight (of a token's experts
            together, mean over tokens; fp32 scalars), load_NE (assignments by source node and
            expert before drops, of the world, fp32; in one process there is one node when not
            training), dropped_E (of them, those that this process knows of, fp32), cosine_T (fp32),
            with several experts for a token `unrouted`, the fraction of tokens without any (fp32
            scalar), and while training with moe.balance: quantile the bias that evened the load,
            bias_X (fp32).
        """
        layout, room = self.transport.layout(x_TD.shape[0], capacity, training)
        bias_X = None
        if training and self.balances:
            bias_X = self.balanced(x_TD, tokens_T, domains_T, noise)
        packed, routed, own = self.route(
            x_TD, tokens_T, domains_T, noise[0], noise[1], layout, room, training, bias_X
        )
        shared = self.transport.share(routed["own_load_NE"], routed["own_probs_NE"])
        y_QD, dropped_E = self.transport.carry(self.experts, packed, shared, capacity, training)
        weight_A = self._unit(routed["weight_A"]) if self.unit_weight else routed["weight_A"]
        y_AD = self.transport.unpack(y_QD, weight_A, packed)
        y_TD = dispatch.sum_choices(y_AD, self.router.choices)

        balance_loss, locality_loss = self.shared_losses(
            routed["own_probs_NE"],
            shared["load_NE"],
            shared["probs_NE"],
            shared["log_probs_NE"],
            training,
        )
        stats = {
            "balance_loss": own.get("balance_loss", balance_loss),
            "locality_loss": own.get("locality_loss", locality_loss),
            "z_loss": own.get("z_loss", ops.zeros((), mstype.float32)),
            "weight": ops.reduce_sum(routed["weight_A"]) * (1.0 / x_TD.shape[0]),
            "load_NE": shared["load_NE"],
            "dropped_E": dropped_E,
            "cosine_T": routed["cosine_T"],
            "bias_X": bias_X,
            "unrouted": dispatch.unrouted_fraction(y_TD) if self.router.choices > 1 else None,
        }
        return y_TD, {name: value for name, value in stats.items() if value is not None}

    def route(
        self,
        x_TD: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
        row_keys_T: Tensor,
        column_keys_D: Tensor,
        layout: Tensor,
        room: int,
        training: bool,
        bias_X: Optional[Tensor] = None,
    ) -> Tuple[Packed, Dict[str, Tensor], Dict[str, Tensor]]:
        """All that comes before ranks meet, and so can be compiled in any job (`compile_parts`).

        Keys come one by one: a compiled part would take a tuple of tensors for a constant. Results
        are dicts that are made at once: MindSpore has no gradient for one that is added to.

        Returns:
            what the transport packs; weight_A, cosine_T, own_load_NE (assignments by node and expert,
            no gradient) and own_probs_NE (mean probabilities), all fp32; the losses that the plan has.
        """
        noise = (row_keys_T, column_keys_D)
        wide_TD = ops.cast(x_TD, mstype.float32)
        if bias_X is None:
            plan = self.router(wide_TD, tokens_T, domains_T, noise, training)
        else:
            plan = self.router(wide_TD, tokens_T, domains_T, noise, training, bias_X)
        nodes = self.transport.nodes_here if training else 1
        own_load_NE = ops.stop_gradient(_sum_by_node(plan["one_hot_AE"], nodes))
        load_E = ops.reduce_sum(own_load_NE, 0)
        x_AD = dispatch.repeat_rows(x_TD, self.router.choices)
        packed = self.transport.pack(x_AD, plan, load_E, layout, room, training)
        routed = {
            "weight_A": plan["weight_A"],
            "cosine_T": plan["cosine_T"],
            "own_load_NE": own_load_NE,
            "own_probs_NE": _sum_by_node(plan["probs_TE"], nodes) * (nodes / x_TD.shape[0]),
        }
        return packed, routed, {name: plan[name] for name in LOSSES if name in plan}

    def balanced(self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor, noise: Noise) -> Tensor:
        """The bias that evens the load of everybody's tokens, found from the last step's; no
        gradient.
        """
        balancer = self.router.balancer
        x_TD = ops.stop_gradient(ops.cast(x_TD, mstype.float32))
        scores_TX = self.scores_of(x_TD, tokens_T, domains_T, noise[0], noise[1])
        bias_X = self.router.bias
        for window in balancer.windows:
            seen_M = self.transport.total(balancer.seen(scores_TX, bias_X, domains_T, window))
            bias_X = balancer.corrected(seen_M, bias_X, window)
        return ops.stop_gradient(bias_X)

    def scores_of(
        self,
        x_TD: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
        row_keys_T: Tensor,
        column_keys_D: Tensor,
    ) -> Tensor:
        """The router's, while training."""
        noise = (row_keys_T, column_keys_D)
        return self.router.scores_of(x_TD, tokens_T, domains_T, noise, True)

    def shared_losses(
        self,
        own_probs_NE: Tensor,
        load_NE: Tensor,
        probs_NE: Tensor,
        log_probs_NE: Tensor,
        training: bool,
    ) -> Tuple[Tensor, Tensor]:
        """Balance and locality loss from what all ranks know, with the gradient by this one's means."""
        shared: Shared = {
            "load_NE": load_NE,
            "probs_NE": self.transport.with_own_gradient(probs_NE, own_probs_NE),
            "log_probs_NE": log_probs_NE,
        }
        return self.router.losses_of(shared, training)

    def compile_parts(self) -> None:
        """Compile what comes before the exchange, and the losses, in a model that is not compiled as a whole.

        Some twenty small operations, forward and backward, are one call then.
        """
        compiled, names = ms.jit(self._route_in_tuples), self.transport.packed_names

        def route(*arguments: Any) -> Tuple[Packed, Dict[str, Tensor], Dict[str, Tensor]]:
            packed, routed, own = compiled(*arguments)
            own_losses = {name: loss[0] for name, loss in zip(LOSSES, own) if loss}
            return dict(zip(names, packed)), dict(zip(ROUTED, routed)), own_losses

        self.route = route  # type: ignore[method-assign,assignment]
        if self.balances:
            balancer = self.router.balancer
            self.scores_of = ms.jit(self.scores_of)  # type: ignore[method-assign]
            balancer.seen = ms.jit(balancer.seen)
            balancer.corrected = ms.jit(balancer.corrected)
        self.shared_losses = ms.jit(self.shared_losses)  # type: ignore[method-assign]

    def _route_in_tuples(self, *arguments: Any) -> Tuple[Tuple[Any, ...], ...]:
        """What `route` returns without the names; for each of LOSSES a tuple of it, or an empty one.

        A compiled part that follows another one has no gradient in MindSpore if it returns dicts.
        """
        packed, routed, own = MoELayer.route(self, *arguments)
        return (
            tuple([packed[name] for name in self.transport.packed_names]),
            tuple([routed[name] for name in ROUTED]),
            tuple([(own[name],) if name in own else () for name in LOSSES]),
        )

    def _unit(self, weight_A: Tensor) -> Tensor:
        """Weights that are 1 for each token's experts together."""
        choices = self.router.choices
        if choices == 1:
            return ops.ones_like(weight_A)
        weight_TK = ops.reshape(weight_A, (-1, choices))
        return ops.reshape(weight_TK / ops.ReduceSum(keep_dims=True)(weight_TK, 1), (-1,))


def _sum_by_node(values_XE: Tensor, nodes: int) -> Tensor:
    """Sums over equal contiguous runs of rows, one for each node, [N, E]."""
    rows, num_experts = values_XE.shape
    return ops.reduce_sum(ops.reshape(values_XE, (nodes, rows // nodes, num_experts)), 1)
