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
    has_top_k: it follows moe.top_k.
    has_balance_bias: what it chooses by can be shifted by a bias (moe.balance).
    has_node_groups: it has something for each of moe.node_groups, whatever else is asked for.
    uses: keys of `moe` that do nothing for other routers.
    rules: what else it cannot work with.
    """

    has_gate: bool = True
    has_balance_loss: bool = True
    has_locality_loss: bool = False
    has_token_choice: bool = False
    has_top_k: bool = False
    has_balance_bias: bool = False
    has_node_groups: bool = False
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
        yield from self._rules_of_ones_own(config)
        yield from self.rules(config)

    def _rules_of_ones_own(self, config: Config) -> BrokenRules:
        """For a class of the user's: what it has not is an error. Ours leave it, with a note."""
        moe = config.moe
        if moe.router in ROUTER_TRAITS and ":" not in moe.router:
            return
        if not self.has_top_k and moe.top_k > 1:
            yield "moe.top_k", f"is for routers with a gate: a token of {moe.router} has one expert"
        if not self.has_balance_bias and moe.balance != "loss":
            yield "moe.balance", f"must be loss: {moe.router} does not choose by scores"


def with_node_groups(config: Config) -> Config:
    """The configuration with moe.node_groups as a number where the model depends on it: it
    belongs to the model, not to the nodes that a run happens to have.
    """
    moe = config.moe
    traits = ROUTER_TRAITS.get(moe.router, RouterTraits())
    matters = traits.has_node_groups or (moe.token_prior > 0 and traits.has_locality_loss)
    if moe.node_groups is not None or not matters:
        return config
    numbered = moe.model_copy(update={"node_groups": config.parallel.nodes})
    return config.model_copy(update={"moe": numbered})


def top_k(config: Config) -> int:
    """Experts that are due to a token, by which capacities are measured: moe.top_k, where the
    router has it.
    """
    traits = ROUTER_TRAITS.get(config.moe.router, RouterTraits(has_top_k=True))
    return config.moe.top_k if traits.has_top_k else 1


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


def _gate_rules(config: Config) -> BrokenRules:
    """What all routers with a gate have in common."""
    moe = config.moe
    if moe.learn_token_prior and moe.token_prior == 0:
        yield "moe.learn_token_prior", "needs moe.token_prior above 0, where the weights start"
    if moe.bias_rate is not None and moe.balance != "bias":
        yield "moe.bias_rate", "needs moe.balance: bias"


def _top_k_rules(config: Config) -> BrokenRules:
    yield from _gate_rules(config)
    moe = config.moe
    smallest = moe.num_experts
    what = "moe.num_experts"
    if moe.levels == 2 and config.domains:
        what = "the experts of the smallest domain's group"
        smallest = min((moe.group_sizes or {"": moe.num_experts // len(config.domains)}).values())
    if moe.top_k > smallest:
        yield "moe.top_k", f"must be at most {what} ({smallest})"
    if moe.top_k == 1 and moe.weight == "normalized":
        yield (
            "moe.weight",
            "normalized is 1, without a gradient, for one expert: needs moe.top_k > 1, or unit",
        )


def _node_group_rules(config: Config) -> BrokenRules:
    moe = config.moe
    experts = moe.num_experts if moe.cut_from is None else moe.cut_from.num_experts
    if config.model.num_moe_layers and experts % config.node_groups:
        yield (
            "moe.node_groups",
            f"must divide moe.num_experts ({experts}): every group has as many experts"
            + ("" if moe.node_groups else f" (null is parallel.nodes, {config.parallel.nodes})"),
        )


def _locmoe_rules(config: Config) -> BrokenRules:
    yield from _grap_rules(config)
    yield from _top_k_rules(config)
    if config.moe.token_prior > 0:
        yield from _node_group_rules(config)


def _local_hash_rules(config: Config) -> BrokenRules:
    yield from _grap_rules(config)
    yield from _gate_rules(config)
    yield from _node_group_rules(config)
    if config.moe.weight == "normalized":
        yield "moe.weight", "must be unit or probability for local_hash, whose tokens have 1 expert"


def _locmoe_plus_rules(config: Config) -> BrokenRules:
    yield from _grap_rules(config)
    yield from _gate_rules(config)
    moe = config.moe
    chosen = token_choice(config)
    if moe.token_prior > 0:
        yield from _node_group_rules(config)
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


_GRAP_KEYS = frozenset({"z_loss", "gate_scale", "locality_loss", "weight"})
_PRIOR_KEYS = frozenset({"token_prior", "learn_token_prior"})
_BALANCE_KEYS = frozenset({"balance", "bias_rate"})

ROUTER_TRAITS: Dict[str, RouterTraits] = {
    "hash": RouterTraits(has_gate=False, has_balance_loss=False),
    "local_hash": RouterTraits(
        has_locality_loss=True,
        has_balance_bias=True,
        has_node_groups=True,
        uses=_GRAP_KEYS | _BALANCE_KEYS | {"node_groups"},
        rules=_local_hash_rules,
    ),
    "locmoe": RouterTraits(
        has_locality_loss=True,
        has_top_k=True,
        has_balance_bias=True,
        uses=_GRAP_KEYS | _PRIOR_KEYS | _BALANCE_KEYS | {"node_groups", "top_k"},
        rules=_locmoe_rules,
    ),
    "locmoe_plus": RouterTraits(
        has_locality_loss=True,
        has_token_choice=True,
        uses=_GRAP_KEYS | _PRIOR_KEYS | {"node_groups"},
        rules=_locmoe_plus_rules,
    ),
    "switch": RouterTraits(
        has_top_k=True,
        has_balance_bias=True,
        uses=frozenset({"jitter", "z_loss", "weight", "top_k"}) | _PRIOR_KEYS | _BALANCE_KEYS,
        rules=_top_k_rules,
    ),
}
"""The routers of moe/routers/ by name; a class that is registered under another name adds
itself.
"""
