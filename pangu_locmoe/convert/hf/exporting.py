"""A checkpoint -> a folder for Hugging Face's Transformers.

config.json, configuration_pangu_locmoe.py, modeling_pangu_locmoe.py   the model
model.safetensors, or pieces of it and model.safetensors.index.json    its weights, fp32
tokenizer.json, tokenizer_config.json, generation_config.json
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pangu_locmoe.checkpoint.format import (
    find_checkpoint,
    own_tokenizer,
    read_config,
    read_shards,
    read_state,
)
from pangu_locmoe.convert.hf.names import name_there, turned
from pangu_locmoe.convert.hf.settings import TEMPLATES, check_router, model_settings
from pangu_locmoe.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.files import json_text

SHARD_BYTES = 5 * 10**9
"""Larger models are in several files, one of which is in memory at a time."""


def export(path: Path, output: Path, shard_bytes: int = SHARD_BYTES) -> str:
    """Write the folder and return a line that says what was done.

    Args:
        path: run directory or checkpoint.
        output: the folder; must not exist.
        shard_bytes: of weights in one file, at most, where a weight is not larger.

    Raises:
        CheckpointError: there is no checkpoint, or `output` exists or cannot be written.
        ConfigError: the model has a router that PyTorch has not.
    """
    if output.exists():
        raise CheckpointError(f"--output {output}: exists already")
    folder = find_checkpoint(path)
    config = read_config(folder)
    check_router(config)
    tokenizer_file = own_tokenizer(folder)
    tokenizer = Tokenizer.load(tokenizer_file, config.model.vocab_size)
    state = {key: value for key, value in read_state(folder).items() if key in ("step", "identity")}
    texts = {
        "config.json": model_settings(config, state, tokenizer.end_of_document),
        "generation_config.json": _generation(tokenizer, config.model.vocab_size),
        "tokenizer.json": _tokenizer(tokenizer_file, tokenizer.end_of_document),
        "tokenizer_config.json": _tokenizer_settings(config.model.seq_length),
    }
    arrays = read_shards(folder, "model")
    with _whole_folder(output) as temporary:
        for name, value in texts.items():
            text = json_text(value, indent=1, ascii_only=False) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        for file in TEMPLATES.glob("*.py"):
            shutil.copyfile(file, temporary / file.name)
        parameters = _save_weights(arrays, temporary, shard_bytes)
    router = config.moe.router if config.model.num_moe_layers else "none"
    return f"{output}: {parameters:,} numbers, router {router}, from {folder}"


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which is `output` when all is there and nothing before."""
    temporary = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"--output {output}: cannot be written: {error}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _save_weights(arrays: Mapping[str, np.ndarray], folder: Path, shard_bytes: int) -> int:
    """Write weights file by file; returns how many numbers they are."""
    files: List[Path] = []
    weight_map: Dict[str, int] = {}
    waiting: Dict[str, np.ndarray] = {}
    total = numbers = 0

    def write() -> None:
        files.append(folder / f"{len(files)}.safetensors")
        save_file(waiting, files[-1], {"format": "pt"})
        weight_map.update(dict.fromkeys(waiting, len(files)))
        waiting.clear()

    for name in sorted(arrays, key=name_there):
        array = turned(name, arrays[name])
        if waiting and sum(other.nbytes for other in waiting.values()) + array.nbytes > shard_bytes:
            write()
        waiting[name_there(name)] = array
        total += array.nbytes
        numbers += array.size
    write()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return numbers
    names = [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    for file, name in zip(files, names):
        file.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[number - 1] for name, number in weight_map.items()},
    }
    file = folder / "model.safetensors.index.json"
    file.write_text(json_text(index, indent=1) + "\n", encoding="utf-8")
    return numbers


def _generation(tokenizer: Tokenizer, vocab_size: int) -> Dict[str, Any]:
    end = tokenizer.end_of_document
    settings: Dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    # The vocabulary of a small corpus may be smaller than the model's table.
    unused = list(range(tokenizer.vocab_size, vocab_size))
    return {**settings, "suppress_tokens": unused} if unused else settings


def _tokenizer(file: Path, end_of_document: int) -> Dict[str, Any]:
    """tokenizer.json, by which a text begins with `<eod>`, as every document in training does."""
    values: Dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    end = {"SpecialToken": {"id": END_OF_DOCUMENT, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, text],
        "pair": [end, text, end, second],
        "special_tokens": {
            END_OF_DOCUMENT: {
                "id": END_OF_DOCUMENT,
                "ids": [end_of_document],
                "tokens": [END_OF_DOCUMENT],
            }
        },
    }
    return values


def _tokenizer_settings(seq_length: int) -> Dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "pad_token": END_OF_DOCUMENT,
        "padding_side": "left",
        "model_max_length": seq_length,
        "clean_up_tokenization_spaces": False,
        # A text that contains the five characters "<eod>" is only a text.
        "split_special_tokens": True,
    }
