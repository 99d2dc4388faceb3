"""Combinations that cannot work, each with its key and the rule it breaks, and settings that can
but rarely should.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Optional

from pangu_locmoe.config.models import Config
from pangu_locmoe.config.routers import ROUTER_TRAITS


def broken_rules(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, rule) for every combination that cannot work."""
    yield from _broken_model_rules(config)
    yield from _broken_moe_rules(config)
    yield from _broken_parallel_rules(config)
    yield from _broken_memory_rules(config)
    yield from _broken_placement_rules(config)
    yield from _broken_data_rules(config)
    yield from _broken_train_rules(config)


def _broken_model_rules(config: Config) -> Iterator[tuple[str, str]]:
    model = config.model
    if model.hidden_size % model.num_heads:
        yield "model.hidden_size", f"must be divisible by model.num_heads ({model.num_heads})"
    if model.num_moe_layers > model.num_layers - 1:
        yield (
            "model.num_moe_layers",
            (
                f"must be at most model.num_layers - 1 ({model.num_layers - 1}): the query "
                "layer is dense"
            ),
        )


def _broken_moe_rules(config: Config) -> Iterator[tuple[str, str]]:
    model = config.model
    moe = config.moe
    domains = config.domains
    if moe.router in ROUTER_TRAITS:
        yield from ROUTER_TRAITS[moe.router].broken_rules(config)
    elif ":" not in moe.router:
        nearest = difflib.get_close_matches(moe.router, ROUTER_TRAITS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        yield "moe.router", f"must be one of {', '.join(ROUTER_TRAITS)}, or module:Class{hint}"
    statistic = moe.capacity.statistic
    if isinstance(statistic, float) and not 0 <= statistic <= 1:
        yield (
            "moe.capacity.statistic",
            "must be min, median, mean, max or a quantile between 0 and 1",
        )
    for key in ("every", "hysteresis"):
        if getattr(moe.capacity, key) is not None and moe.capacity.policy != "dynamic":
            yield f"moe.capacity.{key}", "needs moe.capacity.policy: dynamic"
    if moe.capacity.max_drop is not None and moe.capacity.policy not in ("bound", "dynamic"):
        yield "moe.capacity.max_drop", "needs moe.capacity.policy: bound or dynamic"
    for key in ("local_factor", "remote_factor"):
        given = getattr(moe.capacity, key) is not None
        static = config.parallel.sizes == "static"
        if given and not static:
            yield f"moe.capacity.{key}", "needs parallel.sizes: static"
        if static and not given:
            yield (
                f"moe.capacity.{key}",
                (
                    "parallel.sizes: static needs a number (slots = factor * tokens of a rank "
                    "/ moe.num_experts) or auto"
                ),
            )
    if (
        moe.cut_from is not None
        and moe.cut_from.first_expert + moe.num_experts > moe.cut_from.num_experts
    ):
        yield (
            "moe.cut_from",
            f"must have room for moe.num_experts ({moe.num_experts}) from its first_expert on",
        )
    if moe.levels == 1 and moe.group_sizes is not None:
        yield "moe.group_sizes", "needs moe.levels: 2"
    if moe.levels == 2 and domains and model.num_moe_layers:
        if moe.group_sizes is None:
            if moe.num_experts % len(domains):
                yield (
                    "moe.num_experts",
                    (
                        f"must be divisible by the number of domains ({len(domains)}) for "
                        "equal groups; or give moe.group_sizes"
                    ),
                )
        else:
            if sorted(moe.group_sizes) != sorted(domains):
                yield (
                    "moe.group_sizes",
                    f"must have exactly the domains of data.sources ({', '.join(domains)})",
                )
            if min(moe.group_sizes.values(), default=0) < 1:
                yield "moe.group_sizes", "every group needs at least 1 expert"
            if sum(moe.group_sizes.values()) != moe.num_experts:
                yield "moe.group_sizes", f"must add up to moe.num_experts ({moe.num_experts})"


def _broken_parallel_rules(config: Config) -> Iterator[tuple[str, str]]:
    yield from _broken_tensor_rules(config)
    yield from _broken_exchange_rules(config)
    if config.parallel.sizes == "static":
        yield from _broken_static_rules(config)
    yield from _broken_division_rules(config)


def _broken_tensor_rules(config: Config) -> Iterator[tuple[str, str]]:
    """Matrices, and rows with sequence parallelism, over the ranks of a replica."""
    parallel = config.parallel
    for key in ("num_heads", "ffn_size", "vocab_size"):
        if getattr(config.model, key) % parallel.tensor_parallel:
            yield (
                f"model.{key}",
                (
                    "must be divisible by parallel.tensor_parallel "
                    f"({parallel.tensor_parallel}), which divides it over ranks"
                ),
            )
    if parallel.sequence_parallel and parallel.tensor_parallel == 1:
        yield (
            "parallel.sequence_parallel",
            "needs parallel.tensor_parallel > 1: ranks that share matrices divide the tokens",
        )
    if parallel.sequence_parallel and config.model.seq_length % parallel.tensor_parallel:
        yield (
            "model.seq_length",
            (
                f"must be divisible by parallel.tensor_parallel ({parallel.tensor_parallel}) "
                "with parallel.sequence_parallel"
            ),
        )
    if parallel.sequence_parallel and config.train.recompute and config.train.has_buffers:
        yield (
            "train.recompute",
            (
                "MindSpore's front end does not compile it with parallel.sequence_parallel in "
                "a step of several graphs (fp16, accumulation)"
            ),
        )
    if parallel.tensor_parallel > 1 and parallel.sizes == "counts" and config.train.recompute:
        yield (
            "train.recompute",
            (
                "would repeat the sums over the tensor-parallel group outside of a compiled "
                "step: needs parallel.sizes: static"
            ),
        )


def _broken_exchange_rules(config: Config) -> Iterator[tuple[str, str]]:
    """Chunks, and the way of the rows."""
    parallel = config.parallel
    if parallel.overlap_chunks > 1 and "auto" in (
        config.moe.capacity.local_factor,
        config.moe.capacity.remote_factor,
    ):
        yield (
            "parallel.overlap_chunks",
            (
                "needs numbers for moe.capacity.local_factor and remote_factor: slots that "
                "follow the counts may not be divisible by it"
            ),
        )
    if parallel.overlap_chunks > 1 and parallel.sizes == "counts":
        yield (
            "parallel.overlap_chunks",
            (
                "needs parallel.sizes: static: which tokens an expert keeps is known only when "
                "all have come"
            ),
        )
    if parallel.exchange == "groupwise" and (
        parallel.tensor_parallel == 1 or parallel.expert_parallel == 1
    ):
        yield (
            "parallel.exchange",
            (
                "groupwise shares the exchange out over a tensor-parallel group: needs "
                "parallel.tensor_parallel > 1 and parallel.expert_parallel > 1"
            ),
        )
    if parallel.exchange == "hierarchical" and parallel.nodes == 1:
        yield (
            "parallel.exchange",
            (
                "hierarchical goes by way of the ranks of a node: needs more than one node "
                "(parallel.nodes)"
            ),
        )
    if parallel.reduction == "hierarchical" and parallel.nodes == 1:
        yield (
            "parallel.reduction",
            "hierarchical adds up between nodes: needs more than one (parallel.nodes)",
        )


def _broken_static_rules(config: Config) -> Iterator[tuple[str, str]]:
    """parallel.sizes: static."""
    parallel = config.parallel
    if parallel.expert_parallel == 1:
        yield (
            "parallel.sizes",
            "static is for the exchange between ranks: needs parallel.expert_parallel > 1",
        )
    if config.moe.capacity.policy != "factor":
        yield (
            "moe.capacity.policy",
            (
                "must be factor with parallel.sizes: static, whose capacity is "
                "moe.capacity.local_factor and remote_factor"
            ),
        )
    if parallel.exchange == "hierarchical":
        yield "parallel.exchange", "must be flat or groupwise with parallel.sizes: static"


def _broken_division_rules(config: Config) -> Iterator[tuple[str, str]]:
    """Experts over ranks, experts and sequences over nodes."""
    parallel = config.parallel
    if config.model.num_moe_layers and config.moe.num_experts % parallel.expert_parallel:
        yield (
            "parallel.expert_parallel",
            (
                f"must divide moe.num_experts ({config.moe.num_experts}): every rank holds as "
                "many experts"
            ),
        )
    if parallel.expert_parallel > 1 and config.train.recompute and parallel.sizes == "counts":
        yield (
            "train.recompute",
            (
                "needs parallel.sizes: static with parallel.expert_parallel > 1: the experts' "
                "inputs follow the routing"
            ),
        )
    if config.micro_batch % parallel.nodes:
        yield (
            "parallel.nodes",
            (
                "must divide train.batch_size / train.accumulation_steps "
                f"({config.micro_batch}): every node reads as many sequences"
            ),
        )
    # Where groups of ranks share the experts, several nodes may hold the same ones; a single
    # process has no such groups.
    if parallel.expert_parallel == 1 and config.moe.num_experts % parallel.nodes:
        yield (
            "parallel.nodes",
            (
                f"must divide moe.num_experts ({config.moe.num_experts}): every node holds as "
                "many experts"
            ),
        )


def _broken_memory_rules(config: Config) -> Iterator[tuple[str, str]]:
    if config.train.offload_expert_optimizer and config.model.num_moe_layers == 0:
        yield (
            "train.offload_expert_optimizer",
            "has nothing to offload: needs sparse layers (model.num_moe_layers)",
        )


def _broken_placement_rules(config: Config) -> Iterator[tuple[str, str]]:
    start = config.placement.start
    policy = config.placement.policy
    for key in ["placement.start"] * (start is not None) + ["placement.policy"] * (policy != "off"):
        if config.parallel.expert_parallel == 1 or config.model.num_moe_layers == 0:
            yield key, "has nothing to move: needs sparse layers and parallel.expert_parallel > 1"
        if config.parallel.sizes == "static":
            yield (
                key,
                (
                    "needs parallel.sizes: counts: the slots of a compiled step are made for "
                    "where its experts are"
                ),
            )
    if isinstance(start, list):
        if len(start) != config.model.num_moe_layers:
            yield (
                "placement.start",
                (
                    f"must have a list for each of the {config.model.num_moe_layers} sparse "
                    "layers (model.num_moe_layers)"
                ),
            )
        for slots in start:
            if sorted(slots) != list(range(config.moe.num_experts)):
                yield (
                    "placement.start",
                    (
                        f"must have each expert from 0 to {config.moe.num_experts - 1} once in "
                        "every layer"
                    ),
                )
    if policy == "off":
        return
    if config.trace.max_rows is not None:
        yield (
            "trace.max_rows",
            "must be null with a placement policy, whose plans are made from the trace",
        )
    if config.placement.every < 2 * config.trace.every:
        yield (
            "placement.every",
            (
                f"must be at least twice trace.every ({config.trace.every}): a plan needs rows "
                "to go by"
            ),
        )


def _broken_data_rules(config: Config) -> Iterator[tuple[str, str]]:
    data = config.data
    domains = config.domains
    if data.mixture is not None:
        if sorted(data.mixture) != sorted(domains):
            yield (
                "data.mixture",
                f"must have exactly the domains of data.sources ({', '.join(domains)})",
            )
        elif min(data.mixture.values(), default=0) < 0 or sum(data.mixture.values()) <= 0:
            yield "data.mixture", "shares must be at least 0 and one of them above 0"
    if data.sharding != "iid" and config.parallel.nodes == 1:
        yield "data.sharding", "needs more than one node (parallel.nodes)"


def _broken_train_rules(config: Config) -> Iterator[tuple[str, str]]:
    train = config.train
    if train.batch_size % train.accumulation_steps:
        yield (
            "train.batch_size",
            f"must be divisible by train.accumulation_steps ({train.accumulation_steps})",
        )
    for key in ("timeline", "profile"):
        step = getattr(config.trace, key)
        if step is not None and step > train.steps:
            yield f"trace.{key}", f"must be at most train.steps ({train.steps})"
    if train.fused and train.precision == "fp32":
        yield (
            "train.fused",
            "flash attention takes fp16 and bf16 only: must be false with train.precision: fp32",
        )
    head_size = config.model.hidden_size // config.model.num_heads
    if train.fused and (head_size % 16 or head_size > 512):
        yield (
            "train.fused",
            (
                "flash attention needs heads of a multiple of 16 up to 512 features: "
                f"model.hidden_size / model.num_heads is {head_size}"
            ),
        )


def doubtful_settings(config: Config, num_ranks: Optional[int] = None) -> Iterator[str]:
    """Yield a line for every setting that works but does not do what its user may hope.

    Args:
        config: the run.
        num_ranks: processes of the job; None: as many as hold all experts once.
    """
    moe = config.moe
    data = config.data
    if moe.capacity.policy in ("bound", "dynamic") and config.model.num_moe_layers:
        yield (
            f"moe.capacity.policy = {moe.capacity.policy!r}: LocMoE's lower bound is most "
            "often far below what the load needs; "
            f"moe.capacity.max_drop ({moe.capacity.allowed_drop:.0%} of the tokens of the "
            "measured step) is the floor, moe.capacity.factor the ceiling"
        )
    # No error: one key should switch the router.
    if moe.router in ROUTER_TRAITS:
        for key, field in type(moe).model_fields.items():
            users = [name for name, traits in ROUTER_TRAITS.items() if key in traits.uses]
            if users and getattr(moe, key) != field.default and moe.router not in users:
                yield (
                    f"moe.{key} = {getattr(moe, key)}: not used by moe.router = {moe.router!r}, "
                    f"but by {', '.join(users)}"
                )
    has_locality_loss = moe.router in ROUTER_TRAITS and ROUTER_TRAITS[moe.router].has_locality_loss
    if has_locality_loss and moe.locality_loss and data.sharding == "iid":
        yield (
            f"moe.locality_loss = {moe.locality_loss} with data.sharding: iid: all nodes "
            "read the same mixture, so no routing can be "
            "local for all of them, and the loss can only cost"
        )
    if (
        moe.capacity.factor < 1
        and moe.capacity.policy != "dropless"
        and config.parallel.sizes == "counts"
        and config.model.num_moe_layers
    ):
        yield (
            f"moe.capacity.factor = {moe.capacity.factor}: at least "
            f"{1 - moe.capacity.factor:.0%} of the tokens are dropped, however even the load is"
        )
    train = config.train
    if train.warmup_steps and train.warmup_steps >= train.steps:
        yield (
            f"train.warmup_steps = {train.warmup_steps} with train.steps = {train.steps}: "
            "the run ends inside its warm-up, "
            f"at {train.steps / train.warmup_steps:.0%} of train.learning_rate, and nothing decays"
        )
    parallel = config.parallel
    local = moe.capacity.local_factor
    if parallel.sizes == "static" and isinstance(local, float):
        sharing = parallel.expert_parallel * parallel.tensor_parallel
        nodes = max(
            1, parallel.nodes * sharing // (num_ranks or sharing)
        )  # over which a layer's experts are spread
        if local < nodes:
            yield (
                f"moe.capacity.local_factor = {local} with the experts of a layer on "
                f"{nodes} nodes: once all tokens stay in their node, "
                f"{1 - local / nodes:.0%} of them find no slot; {nodes} would hold all"
            )
    if has_locality_loss and config.parallel.nodes == 1:
        yield (
            f"moe.router = {moe.router!r} on one node: everything is local, the locality loss "
            "is left out; parallel.nodes makes more, in one process too"
        )
