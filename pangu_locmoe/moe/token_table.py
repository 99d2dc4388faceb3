"""Hash tables from token to expert, balanced by token frequency: what PanGu-Sigma's RRE does on its
second level.

Letters: T tokens, E experts, J domains (one where a token's expert does not depend on them), G
groups of experts with a table each, V vocabulary.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Optional, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common import dtype as mstype

from pangu_locmoe.config import Config

if TYPE_CHECKING:
    from pangu_locmoe.moe.routers.base import RouterContext


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


def token_tables(
    counts_JV: np.ndarray,
    allowed_JE: np.ndarray,
    seed: Sequence[int],
    group_E: Optional[np.ndarray] = None,
    num_groups: int = 1,
) -> np.ndarray:
    """A table for each domain and group of experts, int32 [J, G, V].

    Where every domain may use every expert, all have the same tables, and J is 1. A group without
    experts that the domain may use has zeros, which nobody reads.

    Args:
        counts_JV: occurrences of each token in each domain's training text.
        allowed_JE: which experts each domain may use, bool.
        seed: fixes the tables.
        group_E: the group of each expert, int; None: one group of all.
        num_groups: G.
    """
    generator = np.random.default_rng(list(seed))
    groups = np.zeros(allowed_JE.shape[1], int) if group_E is None else group_E
    if allowed_JE.all():
        counts_JV = counts_JV.sum(axis=0, keepdims=True)
    tables_JGV = np.zeros((len(counts_JV), num_groups, counts_JV.shape[1]), dtype=np.int32)
    for domain, counts_V in enumerate(counts_JV):
        for group in range(num_groups):
            experts = np.flatnonzero(allowed_JE[domain] & (groups == group))
            if len(experts):
                tables_JGV[domain, group] = balanced_table(counts_V, experts, generator)
    return tables_JGV


def group_of_expert(config: Config) -> np.ndarray:
    """Which of moe.node_groups each expert is in, int [E]; a sub-model keeps the whole model's."""
    moe = config.moe
    cut_from = moe.cut_from
    whole = moe.num_experts if cut_from is None else cut_from.num_experts
    first = 0 if cut_from is None else cut_from.first_expert
    return (first + np.arange(moe.num_experts)) // (whole // config.node_groups)


class TokenLookup(nn.Cell):
    """What tables of G groups have for each token, [T, G].

    Args:
        tables: its shape, [J, G, V].
    """

    def __init__(self, tables: Sequence[int]) -> None:
        super().__init__()
        domains, groups, vocab_size = tables
        self.by_domain = domains > 1
        self.of_domain = groups * vocab_size
        self.of_group_1G = Tensor(np.arange(groups, dtype=np.int32)[None] * vocab_size)

    def construct(self, table_X: Tensor, tokens_T: Tensor, domains_T: Tensor) -> Tensor:
        """`table_X` is all tables in one row, in the order of their axes."""
        index_T = tokens_T
        if self.by_domain:
            index_T = tokens_T + domains_T * self.of_domain
        return ops.gather(table_X, ops.expand_dims(index_T, 1) + self.of_group_1G, 0)


class TokenPrior(nn.Cell):
    """beta at each token's entry of a table, or of one table for each group, else 0: what is added
    to the gate's logits (moe.token_prior).

    Args:
        config: the run.
        context: what the router knows.
        by_group: whether there is a table for each of moe.node_groups.

    Attributes:
        beta: where it is learned, of each token and table, a weight.
    """

    def __init__(self, config: Config, context: RouterContext, by_group: bool) -> None:
        super().__init__()
        group_E = group_of_expert(config) if by_group else None
        tables_JGV = token_tables(
            context.token_counts_JV,
            context.allowed_JE,
            [config.train.seed, 2, context.layer],
            group_E,
            config.node_groups if by_group else 1,
        )
        self.lookup = TokenLookup(tables_JGV.shape)
        self.table = Parameter(Tensor(tables_JGV.reshape(-1)), name="table", requires_grad=False)
        self.fixed = config.moe.token_prior
        self.learned = config.moe.learn_token_prior
        if self.learned:
            start = np.full(tables_JGV.size, self.fixed, np.float32)
            self.beta = Parameter(Tensor(start), name="beta")
        experts = config.moe.num_experts
        self.group_E = Tensor(
            np.zeros(experts, np.int32) if group_E is None else group_E.astype(np.int32)
        )
        self.experts_E = Tensor(np.arange(experts, dtype=np.int32))

    def construct(self, tokens_T: Tensor, domains_T: Tensor) -> Tensor:
        """fp32 [T, E]."""
        entry_TE = ops.gather(self.lookup(self.table, tokens_T, domains_T), self.group_E, 1)
        is_entry_TE = ops.cast(ops.equal(entry_TE, self.experts_E), mstype.float32)
        if not self.learned:
            return is_entry_TE * self.fixed
        beta_TG = self.lookup(self.beta, tokens_T, domains_T)
        return is_entry_TE * ops.gather(beta_TG, self.group_E, 1)

    @staticmethod
    def size(config: Config, by_group: bool) -> int:
        """Entries of all tables of a layer."""
        domains = len(config.domains) if config.moe.levels == 2 and config.domains else 1
        return domains * (config.node_groups if by_group else 1) * config.model.vocab_size

    @staticmethod
    def of_domain(config: Config, array_X: np.ndarray, domain: int) -> np.ndarray:
        """A domain's part of the tables, or of beta, in one row."""
        return array_X.reshape(max(1, len(config.domains)), -1)[domain]
