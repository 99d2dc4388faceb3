"""Models of every kind with weights that matter, as checkpoints, and what they say of texts: for the
tests of what leaves for Hugging Face.

Letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from pangu_locmoe.checkpoint.format import save_checkpoint
from pangu_locmoe.checkpoint.restore import restore_model
from pangu_locmoe.config import Config
from pangu_locmoe.convert.extract import extract
from pangu_locmoe.data.packing import positions_and_segments
from pangu_locmoe.data.prepared import Prepared, prepare
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from support import tiny

TWO_LEVELS = {"num_experts": 8, "levels": 2, "group_sizes": {"en": 2, "zh": 2, "code": 4}}
PRIOR = {"token_prior": 1.5, "learn_token_prior": True}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {"model": {"num_moe_layers": 0}},
    "hash": {"moe": {"router": "hash"}},
    "hash by domain": {
        "moe": {"router": "hash", **TWO_LEVELS},
        "model": {"domain_embeddings": True},
    },
    "switch": {
        "moe": {"router": "switch", "jitter": 0.1, "z_loss": 0.1},
        "model": {"dropout": 0.1},
    },
    "switch, top 2": {
        "moe": {
            "router": "switch",
            "top_k": 2,
            "weight": "normalized",
            "shared_experts": 2,
            **PRIOR,
        }
    },
    "switch by domain": {
        "moe": {"router": "switch", "balance": "quantile", "token_prior": 2.0, **TWO_LEVELS}
    },
    "locmoe": {"moe": {"router": "locmoe"}, "data": {"reset_at_document_end": False}},
    "locmoe, prior": {
        "moe": {"router": "locmoe", "top_k": 2, "weight": "unit", "node_groups": 2, **PRIOR},
        "model": {"final_norm": False},
    },
    "locmoe by domain": {
        "moe": {"router": "locmoe", "balance": "bias", "gate_scale": 3.0, **TWO_LEVELS},
        "model": {"domain_embeddings": True},
    },
    "locmoe_plus": {
        "moe": {
            "router": "locmoe_plus",
            "token_choice": {"threshold": 0.6, "max_experts": 3},
            "token_prior": 1.0,
        }
    },
    "locmoe_plus by domain": {
        "moe": {"router": "locmoe_plus", "weight": "normalized", **TWO_LEVELS}
    },
    "local_hash": {"moe": {"router": "local_hash", "node_groups": 2, "balance": "quantile"}},
    "local_hash by domain": {
        "moe": {"router": "local_hash", "weight": "probability", "node_groups": 4, **TWO_LEVELS}
    },
}

PARTS = {
    "part of hash": ("hash by domain", "zh"),
    "part of switch": ("switch by domain", "code"),
    "part of locmoe": ("locmoe by domain", "code"),
    "part of local_hash": ("local_hash by domain", "code"),
}
"""Sub-models: of which case, and of which domain."""


@functools.cache
def config_of(case: str) -> Config:
    sections = CASES[case]
    model = {"num_layers": 4, "num_moe_layers": 2, "init_std": 0.15, **sections.get("model", {})}
    return tiny.tiny_config(**{**sections, "model": model, "train": {"mode": "pynative"}})


def prepared() -> Prepared:
    """All cases have the same text and tokenizer."""
    return prepare(config_of("hash"), False)


@functools.cache
def checkpoint(case: str) -> Path:
    """Random weights, those that start equal or at zero too."""
    folder = tiny.corpus() / "exported" / case.replace(" ", "-")
    folder.parent.mkdir(exist_ok=True)
    if case in PARTS:
        whole, domain = PARTS[case]
        extract(checkpoint(whole), domain, folder)
        return folder
    config = config_of(case)
    model = PanguSigma(config, prepared().token_counts)
    draw = np.random.default_rng(0)
    for parameter in model.get_parameters():
        if parameter.name.endswith((".gamma", ".beta", ".bias")):
            noise = draw.normal(0, 0.2, parameter.shape).astype(np.float32)
            parameter.set_data(Tensor(parameter.asnumpy() + noise))
    state = {"step": 7, "identity": prepared().identity}
    save_checkpoint(folder, config, prepared().path / "tokenizer.json", model, state=state)
    return folder


def texts(config: Config) -> np.ndarray:
    """Sequences with documents that end in the middle, at once, and at the last token, [B, S]."""
    end = prepared().tokenizer.end_of_document
    draw = np.random.default_rng(1)
    tokens_BS = draw.integers(1, 380, (4, config.model.seq_length)).astype(np.int32)
    tokens_BS[:3, 0] = end
    tokens_BS[1, [9, 20, 21]] = end
    tokens_BS[3, -1] = end
    return tokens_BS


def logits(case: str, tokens_BS: np.ndarray, domains_B: np.ndarray) -> np.ndarray:
    """As `evaluate` computes them, fp32 [B, S, V]."""
    model, config = restore_model(checkpoint(case))
    positions_BS, segments_BS = positions_and_segments(
        tokens_BS, prepared().tokenizer.end_of_document, config.data.reset_at_document_end
    )
    keys = Tensor(np.zeros(1, np.int32))
    arrays = (tokens_BS, positions_BS, segments_BS, domains_B.astype(np.int32))
    capacities = (DROPLESS,) * config.model.num_moe_layers
    logits_TV, _ = model(*map(Tensor, arrays), (keys, keys), capacities, False)
    return np.asarray(logits_TV.asnumpy()).reshape(*tokens_BS.shape, -1)
