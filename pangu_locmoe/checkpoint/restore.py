"""A model from a checkpoint, ready to evaluate or to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import mindspore as ms

from pangu_locmoe.checkpoint.format import (
    WEIGHTS,
    find_checkpoint,
    load_weights,
    own_tokenizer,
    passed_over,
    read_config,
    read_state,
)
from pangu_locmoe.config import Config
from pangu_locmoe.config.models import ParallelConfig
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.generate import Generator
from pangu_locmoe.model.sigma import PanguSigma


def restore_model(folder: Path) -> tuple[PanguSigma, Config]:
    """Build a checkpoint's model in this one process and load its weights.

    Raises CheckpointError or ConfigError.
    """
    config = in_one_process(read_config(folder))
    model = PanguSigma(config)
    load_weights(folder, model)
    return model, config


def in_one_process(config: Config) -> Config:
    """The same model without a job: where a job has its experts and who reads what matters for
    training only.
    """
    data = config.data.model_copy(update={"sharding": "iid"})
    train = config.train
    if train.precision == "bf16" and ms.get_context("device_target") == "CPU":
        train = train.model_copy(
            update={"precision": "fp32"}
        )  # CPUs have no bf16; the weights are fp32
    return config.model_copy(update={"parallel": ParallelConfig(), "data": data, "train": train})


def used_checkpoint(path: Path) -> Dict[str, Any]:
    """`checkpoint` and `step` that a run directory or a checkpoint stands for, and `notes` on
    newer ones that are damaged.
    """
    folder = find_checkpoint(path)
    return {
        "checkpoint": str(folder),
        "step": read_state(folder)["step"],
        "notes": passed_over(path, folder, WEIGHTS),
    }


def format_checkpoint(used: Dict[str, Any]) -> str:
    """A line for each note, and one for the checkpoint."""
    return "\n".join(
        [
            *(f"note: {note}" for note in used["notes"]),
            f"checkpoint {used['checkpoint']}, step {used['step']}",
        ]
    )


def restore_generator(path: Path) -> Generator:
    """A generator from a run directory or a checkpoint."""
    folder = find_checkpoint(path)
    tokenizer_file = own_tokenizer(folder)
    model, config = restore_model(folder)
    return Generator(model, config, Tokenizer.load(tokenizer_file, config.model.vocab_size))
