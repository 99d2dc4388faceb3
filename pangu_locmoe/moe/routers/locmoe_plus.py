"""LocMoE+ (Expert-Token Resonance, arXiv 2406.00023): tokens choose experts, then experts choose
among the tokens that chose them.

Letters: T tokens, D hidden, E experts, K experts a token may propose to, A = T*K assignments.
"""

from __future__ import annotations

from typing import Tuple

from mindspore import Tensor, ops
from mindspore.common import dtype as mstype

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import ROUTER_TRAITS, token_choice
from pangu_locmoe.moe import gate
from pangu_locmoe.moe.routers.base import RouterContext, interleaved
from pangu_locmoe.moe.routers.locmoe import LocMoERouter
from pangu_locmoe.nn.noise import Noise


class LocMoEPlusRouter(LocMoERouter, name="locmoe_plus"):
    """Affinity a_ti = cos(x_t, w_i) with GrAP's w_i; probabilities p_ti = softmax_i(s a_ti), s =
    gate_scale * sqrt(n).

    Token choice: token t proposes to its l experts of highest affinity, l being the smallest number
    whose p_ti add up to `threshold`, at most K = `max_experts`. Expert choice: an expert with C
    slots keeps the C proposals of highest affinity; that is the dispatch's, as for every router.
    y_t = sum of p_ti * expert_i(x_t) over the experts that kept t, 0 if none did.

    The paper gives neither the threshold nor its schedule from token choice to expert choice: both
    are configuration (moe.token_choice). A sum of cosines has no fixed end, so that ours adds up
    their softmax, which has the same order. With the default gate_scale, s = sqrt(d) and p is
    LocMoE's for an input of norm sqrt(d), which a LayerNormed one nearly has.
    """

    traits = ROUTER_TRAITS["locmoe_plus"]

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        self.threshold = token_choice(config).threshold
        self.norm = config.model.hidden_size**0.5

    @classmethod
    def max_choices(cls, config: Config) -> int:
        return min(token_choice(config).max_experts, config.moe.num_experts)

    def logits(self, x_TD: Tensor, noise: Noise, training: bool) -> Tensor:
        return super().logits(gate.scaled_to_norm(x_TD, self.norm), noise, training)

    def choose(
        self,
        scores_TX: Tensor,
        logits_TE: Tensor,
        probs_TE: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        experts = []
        one_hots = []
        weights = []
        affinities = []
        left_TE = probs_TE
        sum_T = ops.zeros_like(probs_TE[:, 0])
        for _ in range(self.choices):
            expert_T, one_hot_TE = self.highest(left_TE)
            probability_T = ops.reduce_sum(probs_TE * one_hot_TE, 1)
            # Experts of other domains have probability 0: rounding must not let them in where a
            # group's sum is below 1.
            proposed = ops.logical_and(
                ops.less(sum_T, self.threshold), ops.not_equal(probability_T, 0)
            )
            proposed_T = ops.stop_gradient(ops.cast(proposed, probs_TE.dtype))
            experts.append(expert_T * ops.cast(proposed_T, mstype.int32))
            one_hots.append(one_hot_TE * ops.expand_dims(proposed_T, 1))
            weights.append(probability_T * proposed_T)
            affinities.append(
                ops.reduce_sum(logits_TE * one_hot_TE, 1)
                * (1.0 / (self.scale * self.gate_norm * self.norm))
            )
            sum_T = sum_T + probability_T
            left_TE = left_TE - 2.0 * one_hot_TE
        return (
            interleaved(experts),
            interleaved(one_hots),
            interleaved(weights),
            interleaved(affinities),
        )

    def cosine(self, x_TD: Tensor, logits_TE: Tensor, expert_T: Tensor) -> Tensor:
        return gate.chosen(logits_TE, expert_T) * (1.0 / (self.scale * self.gate_norm * self.norm))
