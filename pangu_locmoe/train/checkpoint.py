"""Checkpoints: one folder each, whole or not there.

    model.safetensors       weights, experts by their global id: blocks.3.moe.experts.5.w_in
    model-rankR.safetensors, optimizer-rankR.safetensors   the experts of rank R and its slices, where a job of several ranks wrote it;
                            the header's `slices` say of what array a slice is which part
    optimizer.safetensors   Adam's moments by weight: adam_m.NAME, adam_v.NAME (absent from inherited and extracted models)
    state.json              step, data position, loss scale, capacities, best validation loss
    config.yaml, tokenizer.json, prepared.json   what it takes to evaluate and to generate
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Mapping, Optional, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pangu_locmoe.config import Config, load_config
from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.parallel.gradients import kind
from pangu_locmoe.parallel.tensor import Cut, cut_of
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.parallel.world import World

_EXPERTS = ".experts."


@dataclass(frozen=True)
class Held:
    """Which experts a process holds.

    Attributes:
        experts: of each layer in the order of its weights, by the layer's name: {"blocks.3.moe": [4, 5]}.
        num_experts: E, of whom the others are on other ranks.
        place, size: of the rank in its tensor-parallel group, whose ranks have a slice each of the arrays that are cut.
    """

    experts: Mapping[str, Sequence[int]]
    num_experts: int
    place: int = 0
    size: int = 1

    @classmethod
    def by(cls, model: nn.Cell) -> Held:
        """All of the model, or one rank's part."""
        layers, tensor = model.moe_layers, model.tensor
        experts = {name: layer.held_experts.tolist() for name, layer in layers.items()}
        return cls(experts, max((layer.num_experts for layer in layers.values()), default=0), tensor.place, tensor.size)

    def names(self, parameter: Parameter) -> List[str]:
        """Checkpoint names of what a parameter holds: an experts' parameter [E, ...] has one for each."""
        if _EXPERTS not in parameter.name:
            return [parameter.name]
        return [parameter.name.replace(_EXPERTS, f"{_EXPERTS}{expert}.") for expert in self.experts[_layer(parameter.name)]]

    def cut(self, parameter: Parameter) -> Optional[Cut]:
        """How the arrays that a parameter holds are cut; those of experts lack its first axis."""
        cut = cut_of(parameter)
        return replace(cut, axis=cut.axis - 1) if cut is not None and _EXPERTS in parameter.name else cut

    def elsewhere(self, name: str) -> bool:
        """Whether a checkpoint's array is of an expert that another rank holds."""
        if _EXPERTS not in name:
            return False
        expert = int(name.split(_EXPERTS)[1].split(".")[0])
        return expert < self.num_experts and expert not in self.experts.get(_layer(name), range(self.num_experts))


def save_checkpoint(
    folder: Path,
    config: Config,
    tokenizer_file: Optional[Path],
    model: nn.Cell,
    optimizer: Optional[nn.Cell] = None,
    state: Optional[Mapping[str, Any]] = None,
    world: Optional[World] = None,
) -> None:
    """Write beside, fsync, rename. Raises CheckpointError when it cannot be written; an older one stays as it was.

    In a job the ranks of the first `expert_parallel` places write their own experts and slices, and rank 0 everything else,
    to a folder that all ranks see.
    """
    world = world or World.of(config)
    rank, topology = world.communicator.rank, world.topology
    shards = topology.expert_parallel * topology.tensor_parallel if world.exchange is not None else 1
    temporary = folder.parent / f".{folder.name}"
    try:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        world.communicator.barrier()
        if rank < shards:
            for name, cell in (("model", model), ("optimizer", optimizer)):
                if cell is not None:
                    own = [p for p in cell.get_parameters() if _writes(p, rank, topology)]
                    file, held = temporary / shard_name(name, rank), Held.by(model)
                    save_file(named_arrays(own, held), file, {"slices": json.dumps(_slices(own, held))})
                    _sync(file)
        if rank == 0:
            contents = {"state.json": json.dumps({"step": 0, **(state or {}), "shards": shards}), "config.yaml": config.to_yaml()}
            if tokenizer_file is not None:
                contents["tokenizer.json"] = tokenizer_file.read_text(encoding="utf-8")
            for name, text in contents.items():
                (temporary / name).write_text(text, encoding="utf-8")
                _sync(temporary / name)
        world.communicator.barrier()
        if rank == 0:
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
            _sync(folder.parent)
        world.communicator.barrier()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint {folder} cannot be written: {error}") from None


def shard_name(name: str, rank: int) -> str:
    """The file of one rank's part: model.safetensors, model-rank1.safetensors, ..."""
    return f"{name}.safetensors" if rank == 0 else f"{name}-rank{rank}.safetensors"


def load_weights(folder: Path, model: nn.Cell) -> None:
    """Load a checkpoint's weights into a model, or into one rank's part of it, whatever number of ranks wrote it.

    Raises:
        CheckpointError: it is damaged, lacks a rank's file, or is of another model.
    """
    _load(folder, "model", model.get_parameters(), Held.by(model))


def load_optimizer(folder: Path, optimizer: nn.Cell, held: Held) -> None:
    """Load Adam's moments of the experts in `held`; as `load_weights`."""
    _load(folder, "optimizer", optimizer.get_parameters(), held)


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
            return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from None


def step_folders(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir())


def latest_whole_checkpoint(run_dir: Path) -> Optional[Path]:
    """The newest checkpoint of which every file can be opened, or None. A damaged one is passed over for the one before."""
    return next((folder for folder in reversed(step_folders(run_dir)) if damage(folder) is None), None)


def damage(folder: Path) -> Optional[str]:
    """What is wrong with a checkpoint, in a line; None for a whole one."""
    try:
        for rank in range(int(read_state(folder).get("shards", 1))):
            for name in ("model", "optimizer"):
                _contents(folder / shard_name(name, rank))
    except CheckpointError as error:
        return str(error)
    return None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder from itself or from a run directory (its newest). Raises CheckpointError if there is none."""
    if (path / "model.safetensors").is_file():
        return path
    folder = latest_whole_checkpoint(path)
    if folder is None:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run directory with one")
    return folder


def remove_old(run_dir: Path, step: int, keep: int, best_step: Optional[int]) -> None:
    """Keep the newest `keep` up to `step` and the best. Later ones, which a resumed run passed over as damaged, do not count."""
    folders = {int(folder.name.split("-")[1]): folder for folder in step_folders(run_dir)}
    for old in [number for number in folders if number <= step][:-keep]:
        if old != best_step:
            shutil.rmtree(folders[old])


def named_arrays(parameters: Iterable[Parameter], held: Held) -> dict[str, np.ndarray]:
    """Arrays by checkpoint name: an experts' parameter [E, ...] becomes E entries by global expert id."""
    arrays: dict[str, np.ndarray] = {}
    for parameter in parameters:
        value = parameter.asnumpy()
        arrays.update(zip(held.names(parameter), value if _EXPERTS in parameter.name else [value]))
    return arrays


def set_parameters(parameters: Iterable[Parameter], arrays: Mapping[str, np.ndarray], origin: str, held: Held) -> None:
    """The inverse of `named_arrays`. Raises CheckpointError naming the first weight that is missing, left over or of another shape."""
    left = set(arrays)
    for parameter in parameters:
        names = held.names(parameter)
        missing = [name for name in names if name not in arrays]
        if missing:
            raise CheckpointError(f"{origin} is of another model: it has no {missing[0]}")
        values, cut = [arrays[name] for name in names], held.cut(parameter)
        if cut is not None:
            values = [_part(value, cut, held, name, origin) for name, value in zip(names, values)]
        value = np.stack(values) if _EXPERTS in parameter.name else values[0]
        if value.shape != parameter.shape:
            raise CheckpointError(f"{origin} is of another model: {names[0]} gives {parameter.name} the shape {list(value.shape)}, not {list(parameter.shape)}")
        parameter.set_data(Tensor(value))
        left.difference_update(names)
    if left:
        raise CheckpointError(f"{origin} is of another model: {min(left)} has no place in this one")


class Shards(Mapping[str, np.ndarray]):
    """The arrays of a checkpoint by name, each read when it is asked for, whole: slices of a tensor-parallel job are put together.

    A rank reads the experts it holds and no others, one array at a time.

    Args:
        folder: the checkpoint.
        name: "model" or "optimizer".
        held: list no experts that are elsewhere; None: list all.
    """

    def __init__(self, folder: Path, name: str, held: Optional[Held] = None) -> None:
        self._files: dict[str, dict[int, Path]] = {}  # those with a slice of it, by place
        self._cuts: dict[str, Cut] = {}
        for rank in range(int(read_state(folder).get("shards", 1))):
            file = folder / shard_name(name, rank)
            keys, slices = _contents(file)
            for key in keys:
                if held is not None and held.elsewhere(key):
                    continue
                place = 0
                if key in slices:
                    axis, blocks, place = slices[key]
                    self._cuts[key] = Cut(axis, blocks)
                self._files.setdefault(key, {})[place] = file

    def __getitem__(self, key: str) -> np.ndarray:
        parts = [_read(file, key) for _, file in sorted(self._files[key].items())]
        return self._cuts[key].whole(parts) if key in self._cuts else parts[0]

    def __contains__(self, key: object) -> bool:
        return key in self._files  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _writes(parameter: Parameter, rank: int, topology: Topology) -> bool:
    """Whether this rank's file has it: every expert and every slice is in one file."""
    writer = {"whole": rank == 0, "slice": rank < topology.tensor_parallel, "expert": True}
    return writer[kind(parameter)]


def _slices(parameters: Iterable[Parameter], held: Held) -> dict[str, list[int]]:
    """For each array that is a slice: axis, blocks, and which place's it is."""
    cuts = [(parameter, held.cut(parameter)) for parameter in parameters]
    return {name: [cut.axis, cut.blocks, held.place] for parameter, cut in cuts if cut is not None for name in held.names(parameter)}


def _part(value: np.ndarray, cut: Cut, held: Held, name: str, origin: str) -> np.ndarray:
    if value.ndim <= cut.axis or value.shape[cut.axis] % (cut.blocks * held.size):
        raise CheckpointError(f"{origin} is of another model: {name} has the shape {list(value.shape)}")
    return cut.part(value, held.place, held.size)


def _read(file: Path, key: str) -> np.ndarray:
    with safe_open(file, framework="numpy") as archive:
        return np.asarray(archive.get_tensor(key))


def _contents(file: Path) -> tuple[list[str], dict[str, list[int]]]:
    """The names of a file's arrays, and which of them are slices."""
    try:
        with safe_open(file, framework="numpy") as archive:
            return list(archive.keys()), json.loads((archive.metadata() or {}).get("slices", "{}"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from None


def _load(folder: Path, name: str, parameters: Iterable[Parameter], held: Held) -> None:
    set_parameters(parameters, Shards(folder, name, held), str(folder / shard_name(name, 0)), held)


def _layer(name: str) -> str:
    """The layer that a weight or its moment belongs to: blocks.3.moe."""
    return name[name.index("blocks.") : name.index(_EXPERTS)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
