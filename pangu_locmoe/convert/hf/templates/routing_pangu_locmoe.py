"""The routers of a pangu_locmoe model in PyTorch.

Letters: T tokens, D hidden, V vocabulary, E experts, K experts of a token, G groups of experts with
a table each, X options (what a router chooses among: experts, or groups of them), J domains, I
items: the entries of all tables of a layer in one row.
"""

from __future__ import annotations

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_pangu_locmoe import PanguLocMoEConfig

MASKED = -1e9
"""Added to what may not be chosen."""


class Router(nn.Module):
    """Which experts a token has, and what their outputs are multiplied by."""

    def __init__(self, config: PanguLocMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.choices = config.num_experts_per_tok

    def forward(self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor) -> Tuple[Tensor, Tensor]:
        """Route T tokens.

        Args:
            x_TD: LayerNormed hidden states, fp32.
            tokens_T, domains_T: token and domain ids.

        Returns:
            expert_TK, int64, -1 where a token has fewer; weight_TK, fp32.
        """
        raise NotImplementedError


class HashRouter(Router):
    """Expert = table[domain, token], weight 1."""

    table: Tensor

    def __init__(self, config: PanguLocMoEConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", _table(config, 1))

    def forward(self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor) -> Tuple[Tensor, Tensor]:
        expert_T1 = _look_up(self.table, 1, self.config, tokens_T, domains_T).long()
        return expert_T1, torch.ones_like(expert_T1, dtype=x_TD.dtype)


class TokenPrior(nn.Module):
    """beta at each token's entry of a table, or of one table for each group, else 0."""

    table: Tensor

    def __init__(self, config: PanguLocMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.groups = 1
        if config.group_of_expert is not None:
            self.groups = config.num_groups
        table_I = _table(config, self.groups)
        self.register_buffer("table", table_I)
        if config.learn_token_prior:
            self.beta = nn.Parameter(torch.full(table_I.shape, config.token_prior))

    def forward(self, tokens_T: Tensor, domains_T: Tensor) -> Tensor:
        """fp32 [T, E]."""
        experts_E = torch.arange(self.config.num_experts, device=tokens_T.device)
        group_E = torch.zeros_like(experts_E)
        if self.config.group_of_expert is not None:
            group_E = torch.tensor(self.config.group_of_expert, device=tokens_T.device)
        at = (self.groups, self.config, tokens_T, domains_T)
        is_entry_TE = (_look_up(self.table, *at)[:, group_E] == experts_E).float()
        if not self.config.learn_token_prior:
            return is_entry_TE * self.config.token_prior
        return is_entry_TE * _look_up(self.beta, *at).float()[:, group_E]


class GatedRouter(Router):
    """Token -> logits -> softmax inside the domain's group -> the experts of the highest scores."""

    bias: Tensor

    def __init__(self, config: PanguLocMoEConfig) -> None:
        super().__init__(config)
        self.num_options = self.options(config)
        if config.token_prior > 0:
            self.prior = TokenPrior(config)
        if config.router_bias:
            self.register_buffer("bias", torch.zeros(self.num_options))

    @staticmethod
    def options(config: PanguLocMoEConfig) -> int:
        return config.num_experts

    def logits(self, x_TD: Tensor) -> Tensor:
        raise NotImplementedError

    def scores(self, probs_TE: Tensor) -> Tensor:
        """What options are chosen by, before the bias, [T, X]."""
        return probs_TE

    def choose(
        self, scores_TX: Tensor, probs_TE: Tensor, tokens_T: Tensor, domains_T: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """expert_TK and weight_TK: here the K experts of the highest scores and their
        probabilities.
        """
        expert_TK = _highest(scores_TX, self.choices)
        return expert_TK, probs_TE.gather(1, expert_TK)

    def forward(self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor) -> Tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        if self.config.token_prior > 0:
            logits_TE = logits_TE + self.prior(tokens_T, domains_T)
        allowed_JE = self._allowed(x_TD.device)
        if allowed_JE is not None:
            logits_TE = logits_TE + (~allowed_JE)[domains_T] * MASKED
        probs_TE = logits_TE.softmax(-1)
        scores_TX = self.scores(probs_TE)
        if self.config.router_bias:
            scores_TX = scores_TX + self.bias.float()
            if allowed_JE is not None:
                allowed_JX = self.scores(allowed_JE.float()) > 0
                scores_TX = scores_TX + (~allowed_JX)[domains_T] * MASKED
        expert_TK, weight_TK = self.choose(scores_TX, probs_TE, tokens_T, domains_T)
        if self.config.router_weight != "probability":
            sum_T1 = weight_TK.sum(1, keepdim=True)
            if self.config.router_weight == "unit":
                sum_T1 = sum_T1.detach()
            weight_TK = weight_TK / sum_T1.clamp(min=1e-20)
        return expert_TK, weight_TK

    def _allowed(self, device: torch.device) -> Optional[Tensor]:
        """Which experts each domain may use, bool [J, E]; None: all."""
        groups = self.config.expert_groups
        if groups is None:
            return None
        first_J1, stop_J1 = torch.tensor(groups, device=device).T.unsqueeze(2)
        experts_E = torch.arange(self.config.num_experts, device=device)
        return (first_J1 <= experts_E) & (experts_E < stop_J1)


class SwitchRouter(GatedRouter):
    """G_i = w_i . x."""

    def __init__(self, config: PanguLocMoEConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.gate.weight.float())


class LocMoERouter(GatedRouter):
    """G_i = scale * mean of the i-th block of features: a gate without parameters."""

    def logits(self, x_TD: Tensor) -> Tensor:
        pooled_TX = x_TD.unflatten(1, (self.config.gate_blocks, -1)).mean(2)
        first = self.config.first_gate_block
        return pooled_TX[:, first : first + self.config.num_experts] * self.config.gate_scale


class LocMoEPlusRouter(LocMoERouter):
    """Logits of tokens scaled to one norm; a token has its fewest experts whose probabilities add
    up to the threshold.
    """

    def logits(self, x_TD: Tensor) -> Tensor:
        norm = self.config.hidden_size**0.5
        scale_T1 = norm * torch.rsqrt((x_TD * x_TD).sum(1, keepdim=True) + 1e-12)
        return super().logits(x_TD * scale_T1)

    def choose(
        self, scores_TX: Tensor, probs_TE: Tensor, tokens_T: Tensor, domains_T: Tensor
    ) -> Tuple[Tensor, Tensor]:
        expert_TK = _highest(probs_TE, self.choices)
        weight_TK = probs_TE.gather(1, expert_TK)
        before_TK = F.pad(weight_TK, (1, 0))[:, :-1].cumsum(1)
        # Experts of other domains have probability 0.
        has_TK = (before_TK < self.config.token_choice_threshold) & (weight_TK != 0)
        return torch.where(has_TK, expert_TK, -1), weight_TK * has_TK


class LocalHashRouter(LocMoERouter):
    """The gate chooses a group of experts by the sum of their probabilities, the group's table the
    expert inside of it.
    """

    table: Tensor

    def __init__(self, config: PanguLocMoEConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", _table(config, self.num_options))

    @staticmethod
    def options(config: PanguLocMoEConfig) -> int:
        return config.num_groups

    def scores(self, probs_TE: Tensor) -> Tensor:
        group_E = torch.tensor(self.config.group_of_expert, device=probs_TE.device)
        return probs_TE @ F.one_hot(group_E, self.num_options).to(probs_TE.dtype)

    def choose(
        self, scores_TX: Tensor, probs_TE: Tensor, tokens_T: Tensor, domains_T: Tensor
    ) -> Tuple[Tensor, Tensor]:
        group_T1 = _highest(scores_TX, 1)
        entry_TG = _look_up(self.table, self.num_options, self.config, tokens_T, domains_T)
        weight_T1 = self.scores(probs_TE).gather(1, group_T1)
        if self.config.router_weight == "unit":
            weight_T1 = torch.ones_like(weight_T1)
        return entry_TG.gather(1, group_T1).long(), weight_T1


ROUTERS = {
    "hash": HashRouter,
    "local_hash": LocalHashRouter,
    "locmoe": LocMoERouter,
    "locmoe_plus": LocMoEPlusRouter,
    "switch": SwitchRouter,
}


def _table(config: PanguLocMoEConfig, groups: int) -> Tensor:
    """All tables of a layer in one row, for each domain that has experts of its own and each group
    of experts.
    """
    domains = 1 if config.expert_groups is None else len(config.expert_groups)
    return torch.zeros(domains * groups * config.vocab_size, dtype=torch.int32)


def _look_up(
    table_I: Tensor,
    groups: int,
    config: PanguLocMoEConfig,
    tokens_T: Tensor,
    domains_T: Tensor,
) -> Tensor:
    """What the tables have for each token, [T, G]."""
    table_JGV = table_I.view(-1, groups, config.vocab_size)
    if len(table_JGV) == 1:
        domains_T = torch.zeros_like(domains_T)
    return table_JGV[domains_T, :, tokens_T]


def _highest(scores_TX: Tensor, choices: int) -> Tensor:
    """Each token's options of the highest scores, best first, the first of equal ones, [T, K]."""
    return scores_TX.sort(dim=1, descending=True, stable=True).indices[:, :choices]
