"""A model from a checkpoint, ready to evaluate or to write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Dict, Optional

import mindspore as ms

from pangu_locmoe.config import Config
from pangu_locmoe.config.models import ParallelConfig
from pangu_locmoe.data.identity import differences
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.generate import Generator
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.train.checkpoint import (
    WEIGHTS,
    find_checkpoint,
    load_weights,
    own_tokenizer,
    passed_over,
    read_config,
    read_identity,
    read_state,
    same_tokenizer,
)
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


def used_checkpoint(path: Path) -> Dict[str, Any]:
    """`checkpoint` and `step` that a run directory or a checkpoint stands for, and `notes` on newer ones that are damaged."""
    folder = find_checkpoint(path)
    return {"checkpoint": str(folder), "step": read_state(folder)["step"], "notes": passed_over(path, folder, WEIGHTS)}


def format_checkpoint(used: Dict[str, Any]) -> str:
    """A line for each note, and one for the checkpoint."""
    return "\n".join([*(f"note: {note}" for note in used["notes"]), f"checkpoint {used['checkpoint']}, step {used['step']}"])


def restore_generator(path: Path) -> Generator:
    """A generator from a run directory or a checkpoint."""
    folder = find_checkpoint(path)
    tokenizer_file = own_tokenizer(folder)
    model, config = restore_model(folder)
    return Generator(model, config, Tokenizer.load(tokenizer_file, config.model.vocab_size))


def evaluate_checkpoint(path: Path, sequences: Optional[int] = None) -> Dict[str, Any]:
    """Evaluate a run directory's newest checkpoint, or a checkpoint, on the validation text of its sources.

    The row also has what `used_checkpoint` says, and `other_data`: what of the text is not what the weights were
    trained on, an empty list where it is the same; None for a checkpoint of an older version, which does not tell.

    Args:
        path: run directory or checkpoint.
        sequences: validation sequences of each domain; None: evaluation.sequences.
    """
    if sequences is not None and sequences < 1:
        raise ConfigError(f"--sequences {sequences}: must be at least 1")
    used = used_checkpoint(path)
    folder = Path(used["checkpoint"])
    tokenizer_file = own_tokenizer(folder)
    model, config = restore_model(folder)
    prepared = prepare(config)
    if not same_tokenizer(tokenizer_file, prepared.path / "tokenizer.json"):
        # Other text, or only a part of what a sub-model was trained on, would give another tokenizer.
        data = config.data.model_copy(update={"tokenizer": str(tokenizer_file)})
        prepared = prepare(config.model_copy(update={"data": data}))
    trained_on = read_identity(folder)
    other_data = None if trained_on is None else differences(trained_on, prepared.identity)
    if other_data is None:
        used["notes"].append("the checkpoint does not say what text it was trained on (an older version wrote it)")
    elif other_data:
        used["notes"].append(f"not the data the checkpoint was trained on: {', '.join(other_data)} changed")
    evaluator = Evaluator(model, config, prepared)
    row = {**used, "other_data": other_data, **evaluator(sequences), "blocks": evaluator.blocks}
    row["perplexity"] = math.exp(row["validation_loss"])
    row["perplexity_by_domain"] = {domain: math.exp(loss) for domain, loss in row["validation_loss_by_domain"].items()}
    row["bigram_bits_per_byte"] = prepared.bigram_bits_per_byte
    return row
