"""Parameter counts: against built models, and on paper."""

from __future__ import annotations

import math

import pytest
from support.small import small_config

from pangu_locmoe.config import parse_config
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.model.size import num_active_params, num_params
from pangu_locmoe.moe.routers import ROUTERS

CONFIGURATIONS = {
    "hash": {"moe": {"router": "hash"}},
    "switch": {"moe": {"router": "switch"}},
    "locmoe": {"moe": {"router": "locmoe"}},
    "locmoe_plus": {"moe": {"router": "locmoe_plus"}},
    "two levels": {"moe": {"router": "hash", "levels": 2}},
    "domain embeddings": {"model": {"domain_embeddings": True}, "moe": {"router": "switch"}},
    "domain embeddings without domains": {
        "model": {"domain_embeddings": True},
        "data": {"sources": []},
    },
    "dense": {"model": {"num_moe_layers": 0}},
    "without final norm": {"model": {"final_norm": False}},
    "deep": {
        "model": {"num_layers": 6, "num_moe_layers": 3},
        "moe": {"router": "switch", "num_experts": 8},
    },
    "one expert": {"moe": {"router": "locmoe", "num_experts": 1}},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_counts_equal_the_built_model(name):
    config = small_config(**CONFIGURATIONS[name])
    sizes = {
        parameter.name: math.prod(parameter.shape)
        for parameter in PanguSigma(config).trainable_params()
    }
    assert num_params(config) == sum(sizes.values())
    slots = max(1, len(config.domains)) if config.model.domain_embeddings else 1
    experts = ROUTERS[config.moe.router].max_choices(config)  # of a token
    active = {
        name: size * experts // config.moe.num_experts
        if ".experts." in name
        else size // (slots if name == "word_table" else 1)
        for name, size in sizes.items()
    }
    assert num_active_params(config) == sum(active.values())


def paper(router: str, num_experts: int):
    model = {
        "vocab_size": 40000,
        "hidden_size": 5120,
        "num_layers": 40,
        "num_moe_layers": 8,
        "num_heads": 40,
        "ffn_size": 20480,
        "seq_length": 1024,
    }
    return parse_config({"model": model, "moe": {"router": router, "num_experts": num_experts}})


@pytest.mark.parametrize("router", ["hash", "switch", "locmoe"])
def test_locmoes_38b(router):
    assert num_params(paper(router, 16)) == pytest.approx(37.95e9, rel=0.01)


def test_pangu_sigmas_trillion():
    assert num_params(paper("hash", 640)) == pytest.approx(1.085e12, rel=0.01)


def test_a_token_meets_the_13b_trunk():
    dense = parse_config(
        paper("hash", 16).model_dump()
        | {"model": paper("hash", 16).model.model_dump() | {"num_moe_layers": 0}}
    )
    assert num_active_params(paper("hash", 640)) == num_params(dense) == num_active_params(dense)
    assert num_params(dense) == pytest.approx(12.8e9, rel=0.01)  # 12 * 5120^2 * 40 + 0.2e9
