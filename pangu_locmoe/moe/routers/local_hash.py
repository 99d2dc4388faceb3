"""Local hash: LocMoE's gate chooses the node, a hash table the expert inside of it.

Letters: T tokens, E experts, G node groups (this router's options), J domains, V vocabulary.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np
from mindspore import Parameter, Tensor, ops

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.moe.routers.base import MASKED, RouterContext
from pangu_locmoe.moe.routers.locmoe import LocMoERouter
from pangu_locmoe.moe.token_table import TokenLookup, group_of_expert, token_tables


class LocalHashRouter(LocMoERouter, name="local_hash"):
    """Level 1: P_g, the sum of GrAP's probabilities over the experts of group g; the token goes to
    the group of the highest. Level 2: that group's table, balanced by token frequency, has the
    token's expert (PanGu-Sigma's RRE, with a learned and local first level in place of the domain's
    label).

    A group is as many consecutive experts as a node of the cluster that the model is made for
    holds (moe.node_groups). The gate learns from the locality and the balance loss; with
    moe.weight: probability also from the expert's output, which is then scaled by P_g.
    """

    traits = ROUTER_TRAITS["local_hash"]

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        self.weighting = "probability"  # P_g is all there is, or nothing
        self.has_unit_weight = config.moe.weight != "probability"
        tables_JGV = token_tables(
            context.token_counts_JV,
            context.allowed_JE,
            [config.train.seed, 2, context.layer],
            group_of_expert(config),
            config.node_groups,
        )
        self.lookup = TokenLookup(tables_JGV.shape)
        self.table = Parameter(Tensor(tables_JGV.reshape(-1)), name="table", requires_grad=False)
        self.members_EG = Tensor(self.options(config).astype(np.float32))

    @classmethod
    def options(cls, config: Config) -> np.ndarray:
        return group_of_expert(config)[:, None] == np.arange(config.node_groups)

    @classmethod
    def cut(
        cls, config: Config, name: str, array: np.ndarray, domain: int, experts: range
    ) -> np.ndarray:
        if name == "bias":  # a group without experts of the domain is not to be chosen
            has_experts_G = cls.options(config)[experts.start : experts.stop].any(axis=0)
            return np.where(has_experts_G, array, np.float32(MASKED))
        return array.reshape(max(1, len(config.domains)), -1)[domain] - experts.start

    def scores(self, probs_TE: Tensor) -> Tensor:
        return ops.MatMul()(probs_TE, self.members_EG)

    def choose(
        self,
        scores_TX: Tensor,
        logits_TE: Tensor,
        probs_TE: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        _, one_hot_TG = self.highest(scores_TX)
        probability_T = ops.reduce_sum(self.scores(probs_TE) * one_hot_TG, 1)
        entry_TG = ops.cast(self.lookup(self.table, tokens_T, domains_T), probs_TE.dtype)
        expert_T = ops.cast(ops.reduce_sum(entry_TG * one_hot_TG, 1), self.experts_E.dtype)
        one_hot_TE = ops.cast(
            ops.equal(ops.expand_dims(expert_T, 1), self.experts_E), probs_TE.dtype
        )
        weight_T = ops.ones_like(probability_T) if self.has_unit_weight else probability_T
        return expert_T, one_hot_TE, weight_T, probability_T
