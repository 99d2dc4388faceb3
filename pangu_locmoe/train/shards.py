"""The arrays of a checkpoint: which of them a process holds, under which names, and how the ranks' files make up the whole.

Experts go by their global id. An array that tensor parallelism divides is a slice in each file; the file's header says of what.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import List, Optional

import numpy as np
from mindspore import Parameter, Tensor, nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.parallel.tensor import Cut, cut_of

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


def save_arrays(parameters: Sequence[Parameter], held: Held, file: Path) -> None:
    """Write what a process holds of some parameters."""
    save_file(named_arrays(parameters, held), file, {"slices": json.dumps(_slices(parameters, held))})


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
        files: those of all ranks that wrote.
        held: list no experts that are elsewhere; None: list all.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, files: Iterable[Path], held: Optional[Held] = None) -> None:
        self._files: dict[str, dict[int, Path]] = {}  # those with a slice of it, by place
        self._cuts: dict[str, Cut] = {}
        for file in files:
            keys, slices = contents(file)
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


def contents(file: Path) -> tuple[list[str], dict[str, list[int]]]:
    """The names of a file's arrays, and of those that are slices axis, blocks and place. Raises CheckpointError."""
    try:
        with safe_open(file, framework="numpy") as archive:
            return list(archive.keys()), json.loads((archive.metadata() or {}).get("slices", "{}"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from None


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


def _layer(name: str) -> str:
    """The layer that a weight or its moment belongs to: blocks.3.moe."""
    return name[name.index("blocks.") : name.index(_EXPERTS)]
