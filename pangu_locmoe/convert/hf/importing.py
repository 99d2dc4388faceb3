"""The folder of an exported model, or what `save_pretrained` made of it -> a checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
from safetensors import SafetensorError, safe_open

from pangu_locmoe.checkpoint.format import save_checkpoint
from pangu_locmoe.checkpoint.restore import in_one_process
from pangu_locmoe.checkpoint.shards import Held, set_parameters
from pangu_locmoe.config import Config
from pangu_locmoe.config.stored import stored_config
from pangu_locmoe.convert.hf.names import name_here, turned
from pangu_locmoe.convert.hf.settings import STORED, check_router
from pangu_locmoe.data.identity import tokenizer_digest
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.world import World

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def import_hf(folder: Path, output: Path) -> str:
    """Write the checkpoint and return a line that says what was done.

    Weights that were saved in half precision become fp32, as checkpoints have them.

    Args:
        folder: written by `export`, or by `save_pretrained` of the model and the tokenizer.
        output: folder of the new checkpoint; must not exist.

    Raises:
        CheckpointError: the folder is not of such a model, is damaged, or has other weights or
            another tokenizer than its configuration says; or `output` exists.
    """
    if output.exists():
        raise CheckpointError(f"--output {output}: exists already")
    config, state = _configuration(folder)
    check_router(config)
    own = in_one_process(config)
    model = PanguSigma(own)
    set_parameters(model.get_parameters(), _Weights(folder), str(folder), Held.by(model))
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer_file = Path(temporary) / "tokenizer.json"
        # What was added for Transformers is not in force here, and is not saved.
        Tokenizer.load(folder / "tokenizer.json", config.model.vocab_size).save(tokenizer_file)
        identity = state.get("identity")
        if identity is not None and identity["tokenizer"] != tokenizer_digest(tokenizer_file):
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} is not the tokenizer the model was trained with"
            )
        save_checkpoint(output, config, tokenizer_file, model, state=state, world=World.of(own))
    return f"{output}: from {folder}"


def _configuration(folder: Path) -> Tuple[Config, Dict[str, Any]]:
    """The configuration the model was trained with, and what its checkpoint's state said."""
    values = _json(folder / "config.json").get(STORED)
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
        raise CheckpointError(
            f"{folder / 'config.json'} has no {STORED}: it is not of an exported pangu_locmoe model"
        )
    return stored_config(values["config"]), dict(values.get("state") or {})


class _Weights(Mapping[str, np.ndarray]):
    """The weights by their checkpoint names, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        if (folder / _INDEX).is_file():
            weight_map = _json(folder / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{folder / _INDEX} has no weight_map")
            files = sorted({folder / str(name) for name in weight_map.values()})
        else:
            files = [folder / _WHOLE]
        self._found: Dict[str, Tuple[Path, str]] = {}
        for file in files:
            try:
                with safe_open(file, framework="numpy") as archive:
                    keys = list(archive.keys())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} is missing or damaged: {error}") from None
            self._found.update({name_here(key): (file, key) for key in keys})

    def __getitem__(self, name: str) -> np.ndarray:
        file, key = self._found[name]
        array = turned(name, _read(file, key))
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _read(file: Path, key: str) -> np.ndarray:
    with safe_open(file, framework="numpy") as archive:
        view = archive.get_slice(key)
        if view.get_dtype() != "BF16":
            return np.asarray(archive.get_tensor(key))
        shape = view.get_shape()
    # NumPy has no bf16, which is the upper half of an fp32.
    with file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        begin, end = json.loads(raw.read(length))[key]["data_offsets"]
        raw.seek(8 + length + begin)
        halves = np.frombuffer(raw.read(end - begin), "<u2")
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(shape)


def _json(file: Path) -> Dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} cannot be read: it is not an object")
    return values
