"""config.json: sizes under Hugging Face's names, and what the PyTorch routers go by, resolved, so
that nothing there has to know how a configuration is read.

Letters: J domains, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from pangu_locmoe import __version__
from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import token_choice
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.routers import router_class
from pangu_locmoe.moe.token_table import group_of_expert

TEMPLATES = Path(__file__).parent / "templates"
ROUTERS = ("hash", "local_hash", "locmoe", "locmoe_plus", "switch")
"""Those that the PyTorch model has."""

STORED = "training_config"
"""Where config.json keeps what the way back needs."""


def check_router(config: Config) -> None:
    """Raises ConfigError where the model has a router that the PyTorch model has not."""
    router = config.moe.router
    if config.model.num_moe_layers and router not in ROUTERS:
        raise ConfigError(
            f"moe.router = {router!r}: cannot be exported, PyTorch has only {', '.join(ROUTERS)}"
        )


def model_settings(
    config: Config, state: Mapping[str, Any], end_of_document: int
) -> Dict[str, Any]:
    """The content of config.json.

    Args:
        config: the checkpoint's.
        state: what else of the checkpoint the way back should find again.
        end_of_document: the token's id.
    """
    model = config.model
    return {
        "architectures": ["PanguLocMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_pangu_locmoe.PanguLocMoEConfig",
            "AutoModel": "modeling_pangu_locmoe.PanguLocMoEModel",
            "AutoModelForCausalLM": "modeling_pangu_locmoe.PanguLocMoEForCausalLM",
        },
        "model_type": "pangu_locmoe",
        "dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_moe_layers": model.num_moe_layers,
        "num_attention_heads": model.num_heads,
        "max_position_embeddings": model.seq_length,
        "dropout": model.dropout,
        "initializer_range": model.init_std,
        "final_norm": model.final_norm,
        "reset_at_document_end": config.data.reset_at_document_end,
        "domains": list(config.domains) or [""],
        "default_domain_id": 0,
        "domain_embeddings": model.domain_embeddings,
        **(_router_settings(config) if model.num_moe_layers else {}),
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "pad_token_id": end_of_document,
        "tie_word_embeddings": False,
        STORED: {
            "pangu_locmoe": __version__,
            "config": config.model_dump(mode="json"),
            "state": dict(state),
        },
    }


def _router_settings(config: Config) -> Dict[str, Any]:
    moe = config.moe
    router = router_class(config)
    by_group = moe.router == "local_hash" or (
        moe.token_prior > 0 and router.traits.has_locality_loss
    )
    blocks = moe.num_experts if moe.cut_from is None else moe.cut_from.num_experts
    return {
        "router": moe.router,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.max_choices(config),
        "shared_experts": moe.shared_experts,
        "expert_groups": _expert_groups(config),
        "router_weight": moe.weight or ("unit" if moe.router == "local_hash" else "probability"),
        "router_bias": moe.balance != "loss" and router.traits.has_balance_bias,
        "gate_scale": moe.gate_scale or (config.model.hidden_size / blocks) ** 0.5,
        "gate_blocks": blocks,
        "first_gate_block": 0 if moe.cut_from is None else moe.cut_from.first_expert,
        "num_groups": config.node_groups if by_group else 1,
        "group_of_expert": group_of_expert(config).tolist() if by_group else None,
        "token_prior": moe.token_prior if "token_prior" in router.traits.uses else 0.0,
        "learn_token_prior": moe.learn_token_prior,
        "token_choice_threshold": token_choice(config).threshold,
    }


def _expert_groups(config: Config) -> Optional[List[List[int]]]:
    """The experts [first, stop) of each domain's group; None where all may use all."""
    allowed_JE = allowed_experts(config)
    if allowed_JE.all():
        return None
    held = [allowed_E.nonzero()[0] for allowed_E in allowed_JE]
    return [[int(experts[0]), int(experts[-1]) + 1] for experts in held]
