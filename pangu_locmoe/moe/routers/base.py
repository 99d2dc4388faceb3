"""What a router is, the registry, and what all routers with a gate have in common.

The contract of a router is its plan (moe/plan.py), and what training adds to the loss for it: a
loss that follows from everybody's counts and mean probabilities is computed by `losses_of` from
what all ranks have shared; a loss that is a mean over tokens may be in the plan. Either is the same
on any number of ranks.

Letters: T tokens, D hidden, E experts, A assignments (moe/plan.py), N source nodes, J domains, V
vocabulary, X options: what a router chooses among by its scores, and balances (moe/balance.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Dict, List, Optional, Tuple, Type

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common import dtype as mstype

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import ROUTER_TRAITS, RouterTraits
from pangu_locmoe.moe import losses
from pangu_locmoe.moe.balance import QuantileBalancer
from pangu_locmoe.moe.plan import RoutingPlan, Shared
from pangu_locmoe.moe.token_table import TokenPrior
from pangu_locmoe.nn.noise import Noise
from pangu_locmoe.parallel.topology import Topology

ROUTERS: Dict[str, Type[Router]] = {}

MASKED = -1e9
"""Added to what may not be chosen."""

_TRAITS = [field.name for field in fields(RouterTraits)]


@dataclass(frozen=True)
class RouterContext:
    """What a router may know besides the configuration.

    layer: index of the MoE layer among the MoE layers, int; seeds what is random per layer.
    allowed_JE: which experts each domain may use, bool [J, E].
    topology: which node holds which expert.
    token_counts_JV: occurrences of each token in each domain's training text, int64 [J, V].
    """

    layer: int
    allowed_JE: np.ndarray
    topology: Topology
    token_counts_JV: np.ndarray

    # The names before, which routers of users may have.

    @property
    def allowed_KE(self) -> np.ndarray:
        return self.allowed_JE

    @property
    def token_counts_KV(self) -> np.ndarray:
        return self.token_counts_JV


class Router(nn.Cell):
    """A router maps T tokens to experts.

    Subclass it in a file of this folder with `name="..."` to register it.

    traits: what it is, for those who do not build it (config/routers.py). A class says what is
        otherwise with it by an attribute of the trait's name: has_balance_loss = False.
    """

    traits: ClassVar[RouterTraits] = RouterTraits()

    def __init_subclass__(cls, name: Optional[str] = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        said = {key: value for key, value in vars(cls).items() if key in _TRAITS}
        cls.traits = replace(cls.traits, **said)
        if name is not None:
            ROUTERS[name] = cls
            ROUTER_TRAITS.setdefault(name, cls.traits)

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(auto_prefix=True)
        self.num_experts = config.moe.num_experts
        self.choices = self.max_choices(config)
        # Where experts are at first: a loss that followed them would make placement change what is
        # learned.
        local_NE = context.topology.local_NE
        local_share_NE = losses.local_distribution(local_NE, config.moe.locality_smoothing)
        self.log_local_NE = Tensor(np.log(local_share_NE))
        self.has_experts_N = Tensor((local_NE.sum(axis=1) > 0).astype(np.float32))
        self.several_nodes = context.topology.num_nodes > 1
        self.has_balance_loss = self.traits.has_balance_loss and config.moe.balance == "loss"
        self.balancer: Any = None  # a QuantileBalancer with moe.balance: quantile

    @classmethod
    def max_choices(cls, config: Config) -> int:
        """The most experts a token can have: assignments per token in every plan."""
        return 1

    @classmethod
    def broken_rules(cls, config: Config) -> Iterator[tuple[str, str]]:
        """Yield (key, rule) for every setting this router cannot work with."""
        yield from cls.traits.broken_rules(config)

    @classmethod
    def num_params(cls, config: Config) -> int:
        """Trainable parameters in one layer."""
        return 0

    @classmethod
    def cut(
        cls, config: Config, name: str, array: np.ndarray, domain: int, experts: range
    ) -> np.ndarray:
        """The part of one of the router's weights that a sub-model for one domain keeps.

        Args:
            config: the whole model.
            name: the weight's name inside the router.
            array: its value.
            domain: the domain's id.
            experts: the experts of its group.
        """
        return array

    def construct(
        self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor, noise: Noise, training: bool
    ) -> RoutingPlan:
        """Route T tokens.

        Args:
            x_TD: LayerNormed hidden states of this process's tokens, fp32. In a job those are some
                of the batch, so that a plan may depend on each token alone, and a loss in it is a
                mean over tokens.
            tokens_T: token ids, int32.
            domains_T: domain ids, int32.
            noise: keys of this step's randomness (pangu_locmoe/nn/noise.py).
            training: a constant of the compiled graph.
        """
        raise NotImplementedError

    def losses_of(self, shared: Shared, training: bool) -> Tuple[Tensor, Tensor]:
        """Balance and locality loss of a layer, fp32 scalars, not yet multiplied by their weights.

        Args:
            shared: of all ranks; any function of it is the same on all numbers of them.
            training: a constant of the compiled graph.
        """
        balance = ops.zeros((), mstype.float32)
        locality = ops.zeros((), mstype.float32)
        if self.has_balance_loss:
            balance = losses.balance_loss(shared["probs_NE"], shared["load_NE"])
        if self.traits.has_locality_loss and self.several_nodes and training:
            locality = losses.locality_loss(
                shared["probs_NE"], shared["log_probs_NE"], self.log_local_NE, self.has_experts_N
            )
        return balance, locality


class GatedRouter(Router):
    """Token -> logits -> softmax inside the domain's group -> the experts of the highest scores,
    output scaled by their probabilities.

    A subclass says what the logits are; moe.top_k, weight, token_prior and balance are here.

    Attributes:
        bias: what is added to each option's score where it is chosen, but not where it is weighted
            (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), fp32 [X], kept in checkpoints; absent
            with moe.balance: loss.
    """

    traits = RouterTraits(has_top_k=True, has_balance_bias=True)

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        allowed_JE = context.allowed_JE
        self.two_level = not allowed_JE.all()
        self.group_mask_JE = Tensor(np.where(allowed_JE, 0.0, MASKED).astype(np.float32))
        self.has_z_loss = config.moe.z_loss > 0
        self.experts_E = Tensor(np.arange(self.num_experts, dtype=np.int32))
        options_EX = self.options(config)
        self.options_X = Tensor(np.arange(options_EX.shape[1], dtype=np.int32))
        self.weighting = config.moe.weight or "probability"
        self.has_prior = config.moe.token_prior > 0 and "token_prior" in self.traits.uses
        if self.has_prior:
            self.prior = TokenPrior(config, context, by_group=self.traits.has_locality_loss)
        self.has_bias = self.traits.has_balance_bias and config.moe.balance != "loss"
        if self.has_bias:
            zeros = Tensor(np.zeros(options_EX.shape[1], np.float32))
            self.bias = Parameter(zeros, name="bias", requires_grad=False)
            allowed_JX = allowed_JE @ options_EX
            self.option_mask_JX = Tensor(np.where(allowed_JX, 0.0, MASKED).astype(np.float32))
            if config.moe.balance == "quantile":
                self.balancer = QuantileBalancer(options_EX, allowed_JE, self.choices)

    @classmethod
    def max_choices(cls, config: Config) -> int:
        return config.moe.top_k if cls.traits.has_top_k else 1

    @classmethod
    def options(cls, config: Config) -> np.ndarray:
        """Which experts are behind each option, bool [E, X]: here each is one."""
        return np.eye(config.moe.num_experts, dtype=bool)

    @classmethod
    def num_params(cls, config: Config) -> int:
        learned = config.moe.learn_token_prior and "token_prior" in cls.traits.uses
        return TokenPrior.size(config, cls.traits.has_locality_loss) if learned else 0

    @classmethod
    def cut(
        cls, config: Config, name: str, array: np.ndarray, domain: int, experts: range
    ) -> np.ndarray:
        if name in ("prior.table", "prior.beta"):
            own_X = TokenPrior.of_domain(config, array, domain)
            return own_X - experts.start if name == "prior.table" else own_X
        return array[experts.start : experts.stop] if name == "bias" else array

    def logits(self, x_TD: Tensor, noise: Noise, training: bool) -> Tensor:
        """The gate's logits, fp32 [T, E]."""
        raise NotImplementedError

    def cosine(self, x_TD: Tensor, logits_TE: Tensor, expert_T: Tensor) -> Tensor:
        """Cosine of the angle between each token and the gate of its expert, fp32 [T]."""
        raise NotImplementedError

    def scores(self, probs_TE: Tensor) -> Tensor:
        """What options are chosen by, before the bias, fp32 [T, X]."""
        return probs_TE

    def choose(
        self,
        scores_TX: Tensor,
        logits_TE: Tensor,
        probs_TE: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """expert_A, one_hot_AE, weight_A and affinity_A of the plan: here the K options of the
        highest scores, which are experts, and their probabilities.
        """
        experts = []
        one_hots = []
        weights = []
        left_TE = ops.stop_gradient(scores_TX)
        for _ in range(self.choices):
            expert_T, one_hot_TE = self.highest(left_TE)
            experts.append(expert_T)
            one_hots.append(one_hot_TE)
            weights.append(ops.reduce_sum(probs_TE * one_hot_TE, 1))
            left_TE = left_TE + MASKED * 2 * one_hot_TE
        weight_A = interleaved(weights)
        return interleaved(experts), interleaved(one_hots), weight_A, weight_A

    def highest(self, scores_TX: Tensor) -> Tuple[Tensor, Tensor]:
        """Each token's option of the highest score, the first of several: int32 [T], and as ones
        and zeros, fp32 [T, X]. No gradient.
        """
        option_T = ops.cast(ops.ArgMaxWithValue(-1)(scores_TX)[0], mstype.int32)
        one_hot_TX = ops.cast(
            ops.equal(ops.expand_dims(option_T, 1), self.options_X), mstype.float32
        )
        return ops.stop_gradient(option_T), ops.stop_gradient(one_hot_TX)

    def scores_of(
        self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor, noise: Noise, training: bool
    ) -> Tensor:
        """Scores before the bias of what each token may choose, far below all others for the rest,
        fp32 [T, X]; no gradient. For the balancer (moe/balance.py); arguments as of `construct`.
        """
        logits_TE = self.logits(x_TD, noise, training)
        scores_TX = self.scores(ops.softmax(self._allowed(logits_TE, tokens_T, domains_T), -1))
        if self.two_level:
            scores_TX = scores_TX + ops.gather(self.option_mask_JX, domains_T, 0)
        return ops.stop_gradient(scores_TX)

    def construct(
        self,
        x_TD: Tensor,
        tokens_T: Tensor,
        domains_T: Tensor,
        noise: Noise,
        training: bool,
        bias_X: Optional[Tensor] = None,
    ) -> RoutingPlan:
        """As `Router.construct`. bias_X takes the place of the router's own, fp32."""
        logits_TE = self.logits(x_TD, noise, training)
        masked_TE = self._allowed(logits_TE, tokens_T, domains_T)
        probs_TE = ops.softmax(masked_TE, -1)
        scores_TX = self.scores(probs_TE)
        if self.has_bias:
            scores_TX = scores_TX + (self.bias if bias_X is None else bias_X)
            if self.two_level:
                scores_TX = scores_TX + ops.gather(self.option_mask_JX, domains_T, 0)
        expert_A, one_hot_AE, weight_A, affinity_A = self.choose(
            scores_TX, logits_TE, probs_TE, tokens_T, domains_T
        )
        # A token's first assignment is its best.
        expert_T = expert_A[:: self.choices] if self.choices > 1 else expert_A
        z_loss = losses.z_loss(masked_TE) if self.has_z_loss else ops.zeros((), probs_TE.dtype)
        return {
            "expert_A": expert_A,
            "one_hot_AE": one_hot_AE,
            "probs_TE": probs_TE,
            "weight_A": self._weighted(weight_A),
            "affinity_A": ops.stop_gradient(affinity_A),
            "cosine_T": ops.stop_gradient(self.cosine(x_TD, logits_TE, expert_T)),
            "z_loss": z_loss,
        }

    def _allowed(self, logits_TE: Tensor, tokens_T: Tensor, domains_T: Tensor) -> Tensor:
        """Logits with the token's prior, and far below all others where its domain may not go."""
        if self.has_prior:
            logits_TE = logits_TE + self.prior(tokens_T, domains_T)
        if self.two_level:
            logits_TE = logits_TE + ops.gather(self.group_mask_JE, domains_T, 0)
        return logits_TE

    def _weighted(self, weight_A: Tensor) -> Tensor:
        """Probabilities as moe.weight has them."""
        if self.weighting == "probability":
            return weight_A
        weight_TK = ops.reshape(weight_A, (-1, self.choices))
        sum_T1 = ops.ReduceSum(keep_dims=True)(weight_TK, 1)
        if self.weighting == "unit":
            sum_T1 = ops.stop_gradient(sum_T1)
        # A token that proposes to no expert has weights of 0.
        return ops.reshape(weight_TK / ops.maximum(sum_T1, 1e-20), (-1,))


def interleaved(parts: List[Tensor]) -> Tensor:
    """[T, ...] of each of a token's K choices as [A, ...], a token's together."""
    if len(parts) == 1:
        return parts[0]
    return ops.reshape(ops.stack(parts, 1), (-1, *parts[0].shape[1:]))
