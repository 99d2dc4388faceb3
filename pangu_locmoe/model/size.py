"""How many parameters a configuration has, without building it: right for 38B and 1.085T on a
laptop.
"""

from __future__ import annotations

from pangu_locmoe.config import Config
from pangu_locmoe.moe.routers import router_class


def num_params(config: Config) -> int:
    """All trainable parameters."""
    return _dense_params(config) + config.model.num_moe_layers * (
        (config.moe.num_experts + config.moe.shared_experts) * _ffn_params(config)
        + router_class(config).num_params(config)
    )


def num_active_params(config: Config) -> int:
    """Trainable parameters that one token meets at most: its experts in each sparse layer, the
    shared ones among them, and one word-embedding slot.
    """
    model = config.model
    unused_slots = max(0, len(config.domains) - 1) if model.domain_embeddings else 0
    router = router_class(config)
    sparse = model.num_moe_layers * (
        (router.max_choices(config) + config.moe.shared_experts) * _ffn_params(config)
        + router.num_params(config)
    )
    return _dense_params(config) + sparse - unused_slots * model.vocab_size * model.hidden_size


def _dense_params(config: Config) -> int:
    model = config.model
    slots = max(1, len(config.domains)) if model.domain_embeddings else 1
    tables = (
        slots * model.vocab_size + 2 * model.seq_length
    ) * model.hidden_size  # words, positions, queries
    attention_and_norms = 4 * model.hidden_size**2 + 4 * model.hidden_size
    dense_ffns = model.num_layers - model.num_moe_layers
    final_norm = 2 * model.hidden_size if model.final_norm else 0
    return (
        tables
        + model.num_layers * attention_and_norms
        + final_norm
        + dense_ffns * _ffn_params(config)
    )


def _ffn_params(config: Config) -> int:
    return 2 * config.model.hidden_size * config.model.ffn_size
