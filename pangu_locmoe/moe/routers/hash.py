"""Hash: a fixed random table from token to expert (PanGu-Sigma's RRE, level 2), balanced by token
frequency.

Letters: T tokens, E experts, J domains, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, ops

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.moe.plan import RoutingPlan
from pangu_locmoe.moe.routers.base import Router, RouterContext
from pangu_locmoe.moe.token_table import TokenLookup, token_tables
from pangu_locmoe.nn.noise import Noise


class HashRouter(Router, name="hash"):
    """Expert = table[domain, token], weight 1, no gate and no loss (PanGu-Sigma; LocMoE's
    baseline).
    """

    traits = ROUTER_TRAITS["hash"]

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        tables_JGV = token_tables(
            context.token_counts_JV, context.allowed_JE, [config.train.seed, 2, context.layer]
        )
        self.lookup = TokenLookup(tables_JGV.shape)
        # Kept in the checkpoint: what a run was trained with must not depend on how text is counted
        # later.
        self.table = Parameter(Tensor(tables_JGV.reshape(-1)), name="table", requires_grad=False)
        self.experts_E = Tensor(np.arange(config.moe.num_experts, dtype=np.int32))

    @classmethod
    def cut(
        cls, config: Config, name: str, array: np.ndarray, domain: int, experts: range
    ) -> np.ndarray:
        table_JV = array.reshape(-1, config.model.vocab_size)
        return table_JV[domain] - experts.start

    def construct(
        self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor, noise: Noise, training: bool
    ) -> RoutingPlan:
        expert_T = self.lookup(self.table, tokens_T, domains_T)[:, 0]
        one_hot_TE = ops.cast(ops.equal(ops.expand_dims(expert_T, 1), self.experts_E), x_TD.dtype)
        ones_T = ops.ones_like(x_TD[:, 0])
        return {
            "expert_A": expert_T,
            "one_hot_AE": one_hot_TE,
            "probs_TE": one_hot_TE,
            "weight_A": ones_T,
            "affinity_A": ones_T,
            "cosine_T": ops.zeros_like(ones_T),
        }
