"""One domain's sub-model out of a model with two-level routing: it keeps that domain's experts
and nothing else's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Mapping

import numpy as np

from pangu_locmoe.checkpoint.format import (
    find_checkpoint,
    own_tokenizer,
    read_config,
    read_identity,
    read_shards,
    save_checkpoint,
)
from pangu_locmoe.checkpoint.shards import Held, set_parameters
from pangu_locmoe.config import Config, CutFromConfig, TokenChoiceConfig
from pangu_locmoe.config.models import ParallelConfig, PlacementConfig
from pangu_locmoe.data.identity import part_of
from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.routers import router_class


def extract(path: Path, domain: str, output: Path) -> str:
    """Write the sub-model's checkpoint and return a line that says what was done.

    On that domain's text it gives the same logits.

    Args:
        path: run directory or checkpoint of a model with `moe.levels: 2`.
        domain: the domain's name.
        output: folder of the new checkpoint; must not exist.

    Raises:
        CheckpointError: single-level routing, an unknown domain, or `output` exists.
    """
    if output.exists():
        raise CheckpointError(f"--output {output}: exists already")
    folder = find_checkpoint(path)
    config = read_config(folder)
    if config.moe.levels != 2:
        raise CheckpointError(
            f"{folder} routes on one level: its experts belong to all domains, and none "
            "can be taken out alone"
        )
    if domain not in config.domains:
        raise CheckpointError(f"--domain {domain}: the model knows {', '.join(config.domains)}")
    index = config.domains.index(domain)
    held = np.flatnonzero(allowed_experts(config)[index])
    experts = range(int(held[0]), int(held[-1]) + 1)
    part = sub_config(config, domain, experts)
    model = PanguSigma(part)
    arrays = cut_arrays(read_shards(folder, "model"), config, index, experts)
    set_parameters(model.get_parameters(), arrays, str(folder), Held.by(model))
    identity = read_identity(folder)
    state = {} if identity is None else {"identity": part_of(identity, domain)}
    save_checkpoint(output, part, own_tokenizer(folder), model, state=state)
    return (
        f"{output}: domain {domain}, experts {experts.start} to {experts.stop - 1} of "
        f"{config.moe.num_experts}"
    )


def sub_config(config: Config, domain: str, experts: range) -> Config:
    """The configuration of a domain's sub-model: its sources, its experts on one level, the
    whole model's gate.
    """
    sources = [source for source in config.data.sources if source.domain == domain]
    data = config.data.model_copy(update={"sources": sources, "mixture": None, "sharding": "iid"})
    parent = config.moe.cut_from or CutFromConfig(
        num_experts=config.moe.num_experts, first_expert=0
    )
    cut_from = CutFromConfig(
        num_experts=parent.num_experts, first_expert=parent.first_expert + experts.start
    )
    chosen = config.moe.token_choice
    router = router_class(config)
    if router.traits.has_token_choice:
        most = min(router.max_choices(config), len(experts))
        chosen = (chosen or TokenChoiceConfig()).model_copy(update={"max_experts": most})
    # What only a job of several ranks has: slots of a static exchange, experts that move.
    capacity = config.moe.capacity.model_copy(update={"local_factor": None, "remote_factor": None})
    changes = {
        "capacity": capacity,
        "num_experts": len(experts),
        "levels": 1,
        "group_sizes": None,
        "cut_from": cut_from,
        "token_choice": chosen,
    }
    moe = config.moe.model_copy(update=changes)
    return config.model_copy(
        update={
            "data": data,
            "moe": moe,
            "parallel": ParallelConfig(),
            "placement": PlacementConfig(),
        }
    )


def cut_arrays(
    arrays: Mapping[str, np.ndarray], config: Config, domain: int, experts: range
) -> dict[str, np.ndarray]:
    """The sub-model's weights, its experts numbered from 0."""
    kept: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if ".moe.experts." in name:
            block, _, rest = name.partition(".moe.experts.")
            expert, weight = rest.split(".")
            if int(expert) in experts:
                kept[f"{block}.moe.experts.{int(expert) - experts.start}.{weight}"] = array
        elif ".moe.router." in name:
            kept[name] = router_class(config).cut(
                config, name.partition(".moe.router.")[2], array, domain, experts
            )
        elif name == "word_table" and config.model.domain_embeddings:
            kept[name] = array.reshape(len(config.domains), config.model.vocab_size, -1)[domain]
        else:
            kept[name] = array
    return kept
