"""What the package's routers are, known without building one: no MindSpore.

The configuration, the simulation and the load tools go by it. A router of the user's own says the
same of itself (moe/routers/base.py), and is asked where it is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable, Dict, FrozenSet

from pangu_locmoe.config.models import Config, TokenChoiceConfig

BrokenRules = Iterator[tuple[str, str]]
"""(key, rule) of settings that a router cannot work with"""


def no_rules(config: Config) -> BrokenRules:
    """Of a router that works with everything."""
    yield from ()


@dataclass(frozen=True)
class RouterTraits:
    """What a router is.

    has_gate: affinities differ, and there is an angle between a token and its expert's gate.
    has_balance_loss, has_locality_loss: `Router.losses_of` computes it, unless the plan has its
    own.
    has_token_choice: how many experts a token has follows moe.token_choice.
    uses: keys of `moe` that do nothing for other routers.
    rules: what else it cannot work with.
    """

    has_gate: bool = True
    has_balance_loss: bool = True
    has_locality_loss: bool = False
    has_token_choice: bool = False
    uses: FrozenSet[str] = frozenset()
    rules: Callable[[Config], BrokenRules] = no_rules

    def broken_rules(self, config: Config) -> BrokenRules:
        """Yield (key, rule) for every setting that a router like this cannot work with."""
        name = config.moe.router
        if not self.has_gate and config.moe.capacity.policy in ("bound", "dynamic"):
            yield (
                "moe.capacity.policy",
                f"needs a router with a gate: {name} has no angle between token and gate",
            )
        if not self.has_token_choice and config.moe.token_choice is not None:
            yield "moe.token_choice", f"is for locmoe_plus: a token of {name} has one expert"
        yield from self.rules(config)


def token_choice(config: Config) -> TokenChoiceConfig:
    """moe.token_choice, or its defaults."""
    return config.moe.token_choice or TokenChoiceConfig()


def _grap_rules(config: Config) -> BrokenRules:
    cut_from = config.moe.cut_from
    key = "moe.num_experts"
    blocks = config.moe.num_experts
    if cut_from is not None:
        key = "moe.cut_from.num_experts"
        blocks = cut_from.num_experts
    if config.model.num_moe_layers and config.model.hidden_size % blocks:
        rule = f"must be divisible by {key} ({blocks}) for GrAP's blocks of features"
        yield "model.hidden_size", rule


def _locmoe_plus_rules(config: Config) -> BrokenRules:
    yield from _grap_rules(config)
    moe = config.moe
    chosen = token_choice(config)
    if moe.token_choice is not None and chosen.max_experts > moe.num_experts:
        yield "moe.token_choice.max_experts", f"must be at most moe.num_experts ({moe.num_experts})"
    if moe.capacity.drop_order == "position":
        rule = "must be affinity for locmoe_plus, whose experts choose by it"
        yield "moe.capacity.drop_order", rule
    key = "moe.token_choice.transition_steps"
    if chosen.transition_steps and moe.capacity.policy == "dropless":
        yield key, "has no capacity to shrink to with moe.capacity.policy: dropless: must be 0"
    if chosen.transition_steps and config.parallel.sizes == "static":
        yield (
            key,
            "needs parallel.sizes: counts: the slots of a static step do not follow the schedule",
        )
    warmup = moe.capacity.warmup_steps
    if moe.capacity.policy == "bound" and chosen.transition_steps > warmup:
        rule = f"must be at most moe.capacity.warmup_steps ({warmup}), when the bound is measured"
        yield key, rule


_GRAP_KEYS = frozenset({"z_loss", "gate_scale", "locality_loss"})

ROUTER_TRAITS: Dict[str, RouterTraits] = {
    "hash": RouterTraits(has_gate=False, has_balance_loss=False),
    "locmoe": RouterTraits(has_locality_loss=True, uses=_GRAP_KEYS, rules=_grap_rules),
    "locmoe_plus": RouterTraits(
        has_locality_loss=True, has_token_choice=True, uses=_GRAP_KEYS, rules=_locmoe_plus_rules
    ),
    "switch": RouterTraits(uses=frozenset({"jitter", "z_loss"})),
}
"""The routers of moe/routers/ by name; a class that is registered under another name adds
itself.
"""
