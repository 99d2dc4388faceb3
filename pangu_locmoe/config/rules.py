"""Combinations that cannot work, each with its key and the rule it breaks, and settings that can but rarely should."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from pangu_locmoe.config.models import Config


def broken_rules(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, rule) for every combination that cannot work."""
    yield from _broken_model_rules(config)
    yield from _broken_moe_rules(config)
    yield from _broken_parallel_rules(config)
    yield from _broken_placement_rules(config)
    yield from _broken_data_rules(config)
    yield from _broken_train_rules(config)


def _broken_model_rules(config: Config) -> Iterator[tuple[str, str]]:
    model = config.model
    if model.hidden_size % model.num_heads:
        yield "model.hidden_size", f"must be divisible by model.num_heads ({model.num_heads})"
    if model.num_moe_layers > model.num_layers - 1:
        yield "model.num_moe_layers", f"must be at most model.num_layers - 1 ({model.num_layers - 1}): the query layer is dense"


def _broken_moe_rules(config: Config) -> Iterator[tuple[str, str]]:
    # Imported here because routers are registered where their code is, and that imports MindSpore.
    from pangu_locmoe.moe.routers import ROUTERS, outside

    model, moe, domains = config.model, config.moe, config.domains
    if ":" in moe.router and moe.router not in ROUTERS:
        try:
            outside.register(moe.router)
        except ValueError as error:
            yield "moe.router", str(error)
            return
    if moe.router in ROUTERS:
        yield from ROUTERS[moe.router].broken_rules(config)
    else:
        nearest = difflib.get_close_matches(moe.router, ROUTERS, n=1)
        yield "moe.router", f"must be one of {', '.join(ROUTERS)}, or module:Class" + (f"; did you mean {nearest[0]}?" if nearest else "")
    statistic = moe.capacity.statistic
    if isinstance(statistic, float) and not 0 <= statistic <= 1:
        yield "moe.capacity.statistic", "must be min, median, mean, max or a quantile between 0 and 1"
    for key in ("local_factor", "remote_factor"):
        given, static = getattr(moe.capacity, key) is not None, config.parallel.sizes == "static"
        if given and not static:
            yield f"moe.capacity.{key}", "needs parallel.sizes: static"
        if static and not given:
            yield f"moe.capacity.{key}", "parallel.sizes: static needs a number (slots = factor * tokens of a rank / moe.num_experts) or auto"
    if moe.cut_from is not None and moe.cut_from.first_expert + moe.num_experts > moe.cut_from.num_experts:
        yield "moe.cut_from", f"must have room for moe.num_experts ({moe.num_experts}) from its first_expert on"
    if moe.levels == 1 and moe.group_sizes is not None:
        yield "moe.group_sizes", "needs moe.levels: 2"
    if moe.levels == 2 and domains and model.num_moe_layers:
        if moe.group_sizes is None:
            if moe.num_experts % len(domains):
                yield "moe.num_experts", f"must be divisible by the number of domains ({len(domains)}) for equal groups; or give moe.group_sizes"
        else:
            if sorted(moe.group_sizes) != sorted(domains):
                yield "moe.group_sizes", f"must have exactly the domains of data.sources ({', '.join(domains)})"
            if min(moe.group_sizes.values(), default=0) < 1:
                yield "moe.group_sizes", "every group needs at least 1 expert"
            if sum(moe.group_sizes.values()) != moe.num_experts:
                yield "moe.group_sizes", f"must add up to moe.num_experts ({moe.num_experts})"


def _broken_parallel_rules(config: Config) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    if parallel.tensor_parallel > 1:
        yield "parallel.tensor_parallel", "this version does not split matrices over ranks: must be 1"
    if parallel.overlap_chunks > 1:
        yield "parallel.overlap_chunks", "this version does not overlap the exchange with computation: must be 1"
    if parallel.exchange == "groupwise":
        yield "parallel.exchange", "groupwise needs tensor parallelism, which this version does not have: must be flat or hierarchical"
    if parallel.exchange == "hierarchical" and parallel.ranks_per_node is None:
        yield "parallel.exchange", "hierarchical needs parallel.ranks_per_node, which is never guessed"
    if parallel.sizes == "static":
        if parallel.expert_parallel == 1:
            yield "parallel.sizes", "static is for the exchange between ranks: needs parallel.expert_parallel > 1"
        if config.moe.capacity.policy != "factor":
            yield "moe.capacity.policy", "must be factor with parallel.sizes: static, whose capacity is moe.capacity.local_factor and remote_factor"
        if parallel.exchange != "flat":
            yield "parallel.exchange", "must be flat with parallel.sizes: static"
    if config.model.num_moe_layers and config.moe.num_experts % parallel.expert_parallel:
        yield "parallel.expert_parallel", f"must divide moe.num_experts ({config.moe.num_experts}): every rank holds as many experts"
    if parallel.expert_parallel > 1 and config.train.recompute:
        yield "train.recompute", "would repeat the exchange between processes: must be false with parallel.expert_parallel > 1"
    nodes = parallel.emulated_nodes
    if config.micro_batch % nodes:
        yield "parallel.emulated_nodes", f"must divide train.batch_size / train.accumulation_steps ({config.micro_batch}): every node reads as many sequences"
    if config.moe.num_experts % nodes:
        yield "parallel.emulated_nodes", f"must divide moe.num_experts ({config.moe.num_experts}): every node holds as many experts"


def _broken_placement_rules(config: Config) -> Iterator[tuple[str, str]]:
    if config.placement.policy == "off":
        return
    if config.parallel.expert_parallel == 1 or config.model.num_moe_layers == 0:
        yield "placement.policy", "has nothing to move: needs sparse layers and parallel.expert_parallel > 1"
    if config.parallel.sizes == "static":
        yield "placement.policy", "needs parallel.sizes: counts: the slots of a compiled step are made for where its experts are"
    if config.trace.max_rows is not None:
        yield "trace.max_rows", "must be null with a placement policy, whose plans are made from the trace"
    if config.placement.every < 2 * config.trace.every:
        yield "placement.every", f"must be at least twice trace.every ({config.trace.every}): a plan needs rows to go by"


def _broken_data_rules(config: Config) -> Iterator[tuple[str, str]]:
    data, domains = config.data, config.domains
    if data.mixture is not None:
        if sorted(data.mixture) != sorted(domains):
            yield "data.mixture", f"must have exactly the domains of data.sources ({', '.join(domains)})"
        elif min(data.mixture.values(), default=0) < 0 or sum(data.mixture.values()) <= 0:
            yield "data.mixture", "shares must be at least 0 and one of them above 0"
    if data.sharding != "iid" and config.parallel.emulated_nodes == 1 and config.parallel.ranks_per_node is None:
        yield "data.sharding", "needs more than one node (parallel.emulated_nodes, or parallel.ranks_per_node in a job)"


def _broken_train_rules(config: Config) -> Iterator[tuple[str, str]]:
    train = config.train
    if train.batch_size % train.accumulation_steps:
        yield "train.batch_size", f"must be divisible by train.accumulation_steps ({train.accumulation_steps})"
    if train.warmup_steps >= train.steps and train.warmup_steps:
        yield "train.warmup_steps", f"must be less than train.steps ({train.steps})"


def doubtful_settings(config: Config) -> Iterator[str]:
    """Yield a line for every setting that works but does not do what its user may hope."""
    moe, data = config.moe, config.data
    if moe.router == "locmoe" and moe.locality_loss and data.sharding == "iid":
        yield (
            f"moe.locality_loss = {moe.locality_loss} with data.sharding: iid: all nodes read the same mixture, so no routing can be "
            "local for all of them, and the loss can only cost"
        )
    if moe.capacity.factor < 1 and moe.capacity.policy != "dropless" and config.parallel.sizes == "counts" and config.model.num_moe_layers:
        yield f"moe.capacity.factor = {moe.capacity.factor}: at least {1 - moe.capacity.factor:.0%} of the tokens are dropped, however even the load is"
    parallel, local = config.parallel, moe.capacity.local_factor
    if parallel.sizes == "static" and parallel.ranks_per_node is not None and isinstance(local, float):
        nodes = max(1, parallel.expert_parallel // parallel.ranks_per_node)  # over which a layer's experts are spread
        if local < nodes:
            yield (
                f"moe.capacity.local_factor = {local} with the experts of a layer on {nodes} nodes: once all tokens stay in their node, "
                f"{1 - local / nodes:.0%} of them find no slot; {nodes} would hold all"
            )
    if moe.router == "locmoe" and config.parallel.emulated_nodes == 1 and config.parallel.ranks_per_node is None:
        yield "moe.router = 'locmoe' on one node: everything is local, the locality loss is left out; parallel.emulated_nodes studies it"
