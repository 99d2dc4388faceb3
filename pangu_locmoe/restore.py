"""A model from a checkpoint, ready to evaluate or to write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Dict, Optional

import mindspore as ms

from pangu_locmoe.config import Config
from pangu_locmoe.config.models import ParallelConfig
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.errors import CheckpointError, ConfigError
from pangu_locmoe.generate import Generator
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.train.checkpoint import find_checkpoint, load_weights, read_config
from pangu_locmoe.train.evaluate import Evaluator


def restore_model(folder: Path) -> tuple[PanguSigma, Config]:
    """Build a checkpoint's model in this one process and load its weights. Raises CheckpointError or ConfigError."""
    config = in_one_process(read_config(folder))
    model = PanguSigma(config)
    load_weights(folder, model)
    return model, config


def in_one_process(config: Config) -> Config:
    """The same model without a job: where a job has its experts and who reads what matters for training only."""
    data = config.data.model_copy(update={"sharding": "iid"})
    train = config.train
    if train.precision == "bf16" and ms.get_context("device_target") == "CPU":
        train = train.model_copy(update={"precision": "fp32"})  # CPUs have no bf16; the weights are fp32
    return config.model_copy(update={"parallel": ParallelConfig(), "data": data, "train": train})


def restore_generator(path: Path) -> Generator:
    """A generator from a run directory or a checkpoint."""
    folder = find_checkpoint(path)
    model, config = restore_model(folder)
    return Generator(model, config, Tokenizer.load(folder / "tokenizer.json", config.model.vocab_size))


def evaluate_checkpoint(path: Path, sequences: Optional[int] = None) -> Dict[str, Any]:
    """Evaluate a run directory's newest checkpoint, or a checkpoint, on its validation text.

    Args:
        path: run directory or checkpoint.
        sequences: validation sequences of each domain; None: evaluation.sequences.
    """
    if sequences is not None and sequences < 1:
        raise ConfigError(f"--sequences {sequences}: must be at least 1")
    folder = find_checkpoint(path)
    model, config = restore_model(folder)
    prepared = prepare(config)
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise CheckpointError(f"{tokenizer_file} is missing: the checkpoint's weights mean nothing without its tokenizer")
    if (prepared.path / "tokenizer.json").read_bytes() != tokenizer_file.read_bytes():
        # An extracted sub-model was trained on more text than its own sources, which would give another tokenizer.
        data = config.data.model_copy(update={"tokenizer": str(tokenizer_file)})
        prepared = prepare(config.model_copy(update={"data": data}))
    row = Evaluator(model, config, prepared)(sequences)
    row["perplexity"] = math.exp(row["validation_loss"])
    row["perplexity_by_domain"] = {domain: math.exp(loss) for domain, loss in row["validation_loss_by_domain"].items()}
    row["bigram_bits_per_byte"] = prepared.bigram_bits_per_byte
    return row
