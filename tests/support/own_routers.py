"""Routers as users write them, each with another way to say what it costs."""

from __future__ import annotations

from mindspore import ops

from pangu_locmoe.moe.plan import with_losses
from pangu_locmoe.moe.routers import Router
from pangu_locmoe.moe.routers.switch import SwitchRouter


class OwnLosses(SwitchRouter):
    """All three losses are its own, means over tokens; the layer's are not wanted in their
    place.
    """

    has_locality_loss = True

    def construct(self, x_TD, tokens_T, domains_T, noise, training):
        plan = super().construct(x_TD, tokens_T, domains_T, noise, training)
        probs_TE = plan["probs_TE"]
        own = {
            "balance_loss": ops.reduce_mean(ops.reduce_sum(probs_TE * probs_TE, 1)),
            "locality_loss": ops.reduce_mean((probs_TE[:, 0] - 0.5) ** 2),
            "z_loss": ops.reduce_mean(ops.log(plan["weight_A"]) ** 2),
        }
        return with_losses(plan, own)


class Unbalanced(SwitchRouter):
    """A gate with the usual softmax, and no balance loss."""

    has_balance_loss = False


class OneOwnLoss(SwitchRouter):
    """The layer's balance loss, and a locality loss of its own although it claims to have none."""

    def construct(self, x_TD, tokens_T, domains_T, noise, training):
        plan = super().construct(x_TD, tokens_T, domains_T, noise, training)
        return with_losses(plan, {"locality_loss": ops.reduce_mean(plan["probs_TE"][:, 1] ** 2)})


class Spread(SwitchRouter):
    """A loss of everybody's means: the mean over nodes of sum_i P_i^2, and the layer's balance
    loss on top.
    """

    def losses_of(self, shared, training):
        balance_loss, _ = super().losses_of(shared, training)
        squares_NE = shared["probs_NE"] * shared["probs_NE"]
        return balance_loss, ops.reduce_mean(ops.reduce_sum(squares_NE, 1))


class Bare(Router):
    """By token id; a plan without any loss, of which the layer makes the balance loss of the
    counts.
    """

    has_gate = False

    def construct(self, x_TD, tokens_T, domains_T, noise, training):
        expert_T = tokens_T % self.num_experts
        one_hot_TE = ops.one_hot(expert_T, self.num_experts, x_TD[0, 0] * 0 + 1, x_TD[0, 0] * 0)
        ones_T = ops.ones_like(x_TD[:, 0])
        return {
            "expert_A": expert_T,
            "one_hot_AE": one_hot_TE,
            "probs_TE": one_hot_TE,
            "weight_A": ones_T,
            "affinity_A": ones_T,
            "cosine_T": ops.zeros_like(ones_T),
        }
