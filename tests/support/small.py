"""The smallest sensible configuration, for the tests of all rooms.

No conftest: its name would hide those of the folders.
"""

from __future__ import annotations

from typing import Any

from pangu_locmoe.config import Config, parse_config

SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_layers": 3,
        "num_moe_layers": 1,
        "num_heads": 2,
        "ffn_size": 24,
        "seq_length": 8,
        "init_std": 0.3,
    },
    "moe": {"router": "locmoe", "num_experts": 4, "levels": 1},
    "data": {
        "sources": [{"path": "corpus/en", "domain": "en"}, {"path": "corpus/zh", "domain": "zh"}]
    },
    "train": {"steps": 20, "batch_size": 4, "warmup_steps": 2, "learning_rate": 0.01},
}


def small_config(**overrides: dict[str, Any]) -> Config:
    """small_config(moe={"router": "hash"}) is the smallest model with these keys on top."""
    sections = {*SMALL, *overrides}
    return parse_config(
        {name: {**SMALL.get(name, {}), **overrides.get(name, {})} for name in sections}
    )
