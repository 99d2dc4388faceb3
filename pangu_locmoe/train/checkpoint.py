"""Checkpoints: one folder each, whole or not there.

    model.safetensors       weights, experts by their global id: blocks.3.moe.experts.5.w_in
    optimizer.safetensors   Adam's moments by weight: adam_m.NAME, adam_v.NAME (absent from inherited and extracted models)
    state.json              step, data position, loss scale, capacities, best validation loss
    config.yaml, tokenizer.json, prepared.json   what it takes to evaluate and to generate
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional

import numpy as np
from mindspore import Parameter, Tensor, nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pangu_locmoe.config import Config, load_config
from pangu_locmoe.errors import CheckpointError

_EXPERTS = ".experts."


def save_checkpoint(
    folder: Path,
    config: Config,
    tokenizer_file: Optional[Path],
    model: nn.Cell,
    optimizer: Optional[nn.Cell] = None,
    state: Optional[Mapping[str, Any]] = None,
) -> None:
    """Write beside, fsync, rename. Raises CheckpointError when it cannot be written; an older one stays as it was."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        save_file(named_arrays(model.get_parameters()), temporary / "model.safetensors")
        if optimizer is not None:
            save_file(named_arrays(optimizer.get_parameters()), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(dict(state or {"step": 0})), encoding="utf-8")
        (temporary / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, temporary / "tokenizer.json")
        for file in temporary.iterdir():
            _sync(file)
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint {folder} cannot be written: {error}") from None


def load_weights(folder: Path, model: nn.Cell) -> None:
    """Load a checkpoint's weights into a model. Raises CheckpointError if it is damaged or of another model."""
    _load(folder / "model.safetensors", model.get_parameters())


def load_optimizer(folder: Path, optimizer: nn.Cell) -> None:
    """Load Adam's moments. Raises CheckpointError as `load_weights`."""
    _load(folder / "optimizer.safetensors", optimizer.get_parameters())


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's state.json. Raises CheckpointError if it is not a checkpoint."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint: {error}") from None
    return state


def read_config(folder: Path) -> Config:
    """The configuration a checkpoint was trained with."""
    return load_config(folder / "config.yaml")


def check_tokenizer(folder: Path, tokenizer_file: Path) -> None:
    """Raises CheckpointError where a checkpoint was trained with another tokenizer: its token ids would mean other text."""
    own = folder / "tokenizer.json"
    if own.exists() and own.read_bytes() != tokenizer_file.read_bytes():
        raise CheckpointError(f"{folder} was trained with another tokenizer than this run's; set data.tokenizer={own}")


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file. Raises CheckpointError if it is missing or truncated."""
    try:
        with safe_open(file, framework="numpy") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118: not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from None


def step_folders(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir())


def latest_whole_checkpoint(run_dir: Path) -> Optional[Path]:
    """The newest checkpoint whose files can all be opened, or None. A damaged one is passed over for the one before."""
    for folder in reversed(step_folders(run_dir)):
        try:
            read_state(folder)
            for name in ("model.safetensors", "optimizer.safetensors"):
                with safe_open(folder / name, framework="numpy"):
                    pass
        except (CheckpointError, OSError, SafetensorError):
            continue
        return folder
    return None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder from itself or from a run directory (its newest). Raises CheckpointError if there is none."""
    if (path / "model.safetensors").is_file():
        return path
    folder = latest_whole_checkpoint(path)
    if folder is None:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run directory with one")
    return folder


def remove_old(run_dir: Path, keep: int, best_step: Optional[int]) -> None:
    """Keep the newest `keep` and the best."""
    for folder in step_folders(run_dir)[:-keep]:
        if int(folder.name.split("-")[1]) != best_step:
            shutil.rmtree(folder)


def named_arrays(parameters: Iterable[Parameter]) -> dict[str, np.ndarray]:
    """Arrays by checkpoint name: an experts' parameter [E, ...] becomes E entries by global expert id."""
    arrays: dict[str, np.ndarray] = {}
    for parameter in parameters:
        value = parameter.asnumpy()
        if _EXPERTS in parameter.name:
            arrays.update((_expert_name(parameter.name, expert), value[expert]) for expert in range(len(value)))
        else:
            arrays[parameter.name] = value
    return arrays


def set_parameters(parameters: Iterable[Parameter], arrays: Mapping[str, np.ndarray], origin: str) -> None:
    """The inverse of `named_arrays`. Raises CheckpointError naming the first weight that is missing, left over or of another shape."""
    left = set(arrays)
    for parameter in parameters:
        names = [parameter.name]
        if _EXPERTS in parameter.name:
            names = [_expert_name(parameter.name, expert) for expert in range(parameter.shape[0])]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise CheckpointError(f"{origin} is of another model: it has no {missing[0]}")
        value = np.stack([arrays[name] for name in names]) if _EXPERTS in parameter.name else arrays[parameter.name]
        if value.shape != parameter.shape:
            raise CheckpointError(f"{origin} is of another model: {names[0]} gives {parameter.name} the shape {list(value.shape)}, not {list(parameter.shape)}")
        parameter.set_data(Tensor(value))
        left.difference_update(names)
    if left:
        raise CheckpointError(f"{origin} is of another model: {min(left)} has no place in this one")


def _load(file: Path, parameters: Iterable[Parameter]) -> None:
    set_parameters(parameters, read_arrays(file), str(file))


def _expert_name(name: str, expert: int) -> str:
    return name.replace(_EXPERTS, f"{_EXPERTS}{expert}.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
