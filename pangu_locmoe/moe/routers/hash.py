"""Hash: a fixed random table from token to expert (PanGu-Sigma's RRE, level 2), balanced by token
frequency.

Letters: T tokens, E experts, J domains, V vocabulary.
"""

from __future__ import annotations

import heapq

import numpy as np
from mindspore import Parameter, Tensor, ops

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.moe.plan import RoutingPlan
from pangu_locmoe.moe.routers.base import Router, RouterContext
from pangu_locmoe.nn.noise import Noise


def balanced_table(
    counts_V: np.ndarray, experts: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """A random table int32 [V] from token to one of `experts` under which the experts get nearly
    equal counts.

    Tokens in random order within factors of about two of their frequency, frequent ones first, each
    to the expert with the least so far: natural text is Zipf-like, so a purely random table would
    be far from balanced.

    Args:
        counts_V: occurrences of each token; tokens never seen count as one millionth, which spreads
            them evenly too.
        experts: candidate expert ids.
        generator: the source of randomness; fixes the table.
    """
    weight_V = counts_V + 1e-6
    order_V = np.argsort(
        -weight_V * np.exp(generator.normal(0.0, 0.7, len(weight_V))), kind="stable"
    )
    heap = [(0.0, tie, int(expert)) for tie, expert in enumerate(generator.permutation(experts))]
    heapq.heapify(heap)
    table_V = np.empty(len(weight_V), dtype=np.int32)
    for token in order_V:
        filled, tie, expert = heap[0]
        table_V[token] = expert
        heapq.heapreplace(heap, (filled + float(weight_V[token]), tie, expert))
    return table_V


class HashRouter(Router, name="hash"):
    """Expert = table[domain, token], weight 1, no gate and no loss (PanGu-Sigma; LocMoE's
    baseline).
    """

    traits = ROUTER_TRAITS["hash"]

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        generator = np.random.default_rng([config.train.seed, 2, context.layer])
        # With one level every domain has the same table: a token's expert may not depend on its
        # domain.
        single_level = bool(context.allowed_JE.all())
        counts_JV = context.token_counts_JV
        rows = [counts_JV.sum(axis=0)] if single_level else list(counts_JV)
        table = [
            balanced_table(counts_V, np.flatnonzero(allowed_E), generator)
            for counts_V, allowed_E in zip(rows, context.allowed_JE)
        ]
        self.vocab_size = config.model.vocab_size
        self.single_level = single_level
        # Kept in the checkpoint: what a run was trained with must not depend on how text is counted
        # later.
        self.table = Parameter(Tensor(np.concatenate(table)), name="table", requires_grad=False)
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
        index_T = tokens_T if self.single_level else domains_T * self.vocab_size + tokens_T
        expert_T = ops.gather(self.table, index_T, 0)
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
