"""What a router is, the registry, and what all routers with a gate have in common.

The contract of a router is its plan (moe/plan.py), and what training adds to the loss for it: a
loss that follows from everybody's counts and mean probabilities is computed by `losses_of` from
what all ranks have shared; a loss that is a mean over tokens may be in the plan. Either is the same
on any number of ranks.

Letters: T tokens, D hidden, E experts, A assignments (moe/plan.py), N source nodes, J domains, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Dict, Optional, Tuple, Type

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common import dtype as mstype

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import ROUTER_TRAITS, RouterTraits
from pangu_locmoe.moe import losses
from pangu_locmoe.moe.plan import RoutingPlan, Shared
from pangu_locmoe.nn.noise import Noise
from pangu_locmoe.parallel.topology import Topology

ROUTERS: Dict[str, Type[Router]] = {}

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
        if self.traits.has_balance_loss:
            balance = losses.balance_loss(shared["probs_NE"], shared["load_NE"])
        if self.traits.has_locality_loss and self.several_nodes and training:
            locality = losses.locality_loss(
                shared["probs_NE"], shared["log_probs_NE"], self.log_local_NE, self.has_experts_N
            )
        return balance, locality


class GatedRouter(Router):
    """Token -> logits -> softmax inside the domain's group -> the likeliest expert (`choose`),
    output scaled by its probability.
    """

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        allowed_JE = context.allowed_JE
        self.two_level = not allowed_JE.all()
        self.group_mask_JE = Tensor(np.where(allowed_JE, 0.0, -1e9).astype(np.float32))
        self.has_z_loss = config.moe.z_loss > 0
        self.experts_E = Tensor(np.arange(self.num_experts, dtype=np.int32))

    def logits(self, x_TD: Tensor, noise: Noise, training: bool) -> Tensor:
        """The gate's logits, fp32 [T, E]."""
        raise NotImplementedError

    def cosine(self, x_TD: Tensor, logits_TE: Tensor, expert_T: Tensor) -> Tensor:
        """Cosine of the angle between each token and the gate of its expert, fp32 [T]."""
        raise NotImplementedError

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """expert_A, one_hot_AE, weight_A and affinity_A of the plan: here the likeliest expert
        and its probability.
        """
        expert_T, probability_T = ops.ArgMaxWithValue(-1)(probs_TE)
        expert_T = ops.cast(expert_T, mstype.int32)
        one_hot_TE = ops.stop_gradient(
            ops.cast(ops.equal(ops.expand_dims(expert_T, 1), self.experts_E), probs_TE.dtype)
        )
        return expert_T, one_hot_TE, probability_T, probability_T

    def construct(
        self, x_TD: Tensor, tokens_T: Tensor, domains_T: Tensor, noise: Noise, training: bool
    ) -> RoutingPlan:
        logits_TE = self.logits(x_TD, noise, training)
        masked_TE = logits_TE
        if self.two_level:
            masked_TE = logits_TE + ops.gather(self.group_mask_JE, domains_T, 0)
        probs_TE = ops.softmax(masked_TE, -1)
        expert_A, one_hot_AE, weight_A, affinity_A = self.choose(logits_TE, probs_TE)
        # A token's first assignment is its best.
        expert_T = expert_A[:: self.choices] if self.choices > 1 else expert_A
        z_loss = losses.z_loss(masked_TE) if self.has_z_loss else ops.zeros((), probs_TE.dtype)
        return {
            "expert_A": expert_A,
            "one_hot_AE": one_hot_AE,
            "probs_TE": probs_TE,
            "weight_A": weight_A,
            "affinity_A": ops.stop_gradient(affinity_A),
            "cosine_T": ops.stop_gradient(self.cosine(x_TD, logits_TE, expert_T)),
            "z_loss": z_loss,
        }
