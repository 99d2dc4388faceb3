"""The arrays of a checkpoint: which of them a process holds, under which names, and how the ranks'
files make up the whole.

Experts go by their global id. An array that ranks divide (a matrix by tensor parallelism, a moment
by sharding of the optimizer, or both) is a slice in each file; the file's header says of what.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
from mindspore import Parameter, Tensor, nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.parallel.tensor import Cut, Piece, cut_of, piece_of

_EXPERTS = ".experts."


@dataclass(frozen=True)
class Held:
    """Which experts a process holds.

    Attributes:
        experts: of each layer in the order of its weights, by the layer's name: {"blocks.3.moe":
            [4, 5]}.
        num_experts: E, of whom the others are on other ranks.
        position, size: of the rank in its tensor-parallel group, whose ranks have a slice each of
            the arrays that are cut.
    """

    experts: Mapping[str, Sequence[int]]
    num_experts: int
    position: int = 0
    size: int = 1

    @classmethod
    def by(cls, model: nn.Cell) -> Held:
        """All of the model, or one rank's part."""
        layers = model.moe_layers
        tensor = model.tensor
        experts = {name: layer.transport.held_experts.tolist() for name, layer in layers.items()}
        return cls(
            experts,
            max((layer.transport.num_experts for layer in layers.values()), default=0),
            tensor.position,
            tensor.size,
        )

    def names(self, parameter: Parameter) -> List[str]:
        """Checkpoint names of what a parameter holds: an experts' parameter [E, ...] has one for
        each.
        """
        if _EXPERTS not in parameter.name:
            return [parameter.name]
        return [
            parameter.name.replace(_EXPERTS, f"{_EXPERTS}{expert}.")
            for expert in self.experts[_layer(parameter.name)]
        ]

    def slices(self, parameter: Parameter) -> List[Piece]:
        """What a parameter has of the arrays it holds, those of experts without its first axis:
        a slice of each, or a piece of a slice.
        """
        cut = cut_of(parameter)
        piece = piece_of(parameter)
        found = [] if cut is None else [Piece(cut, self.position, self.size)]
        found += [] if piece is None else [piece]
        if _EXPERTS in parameter.name:
            found = [replace(one, cut=replace(one.cut, axis=one.cut.axis - 1)) for one in found]
        return found

    def elsewhere(self, name: str) -> bool:
        """Whether a checkpoint's array is of an expert that another rank holds."""
        if _EXPERTS not in name:
            return False
        expert = int(name.split(_EXPERTS)[1].split(".")[0])
        return expert < self.num_experts and expert not in self.experts.get(
            _layer(name), range(self.num_experts)
        )


def save_arrays(parameters: Sequence[Parameter], held: Held, file: Path) -> None:
    """Write what a process holds of some parameters."""
    save_file(
        named_arrays(parameters, held), file, {"slices": json.dumps(_slices(parameters, held))}
    )


def named_arrays(parameters: Iterable[Parameter], held: Held) -> dict[str, np.ndarray]:
    """Arrays by checkpoint name: an experts' parameter [E, ...] becomes E entries by global
    expert id.
    """
    arrays: dict[str, np.ndarray] = {}
    for parameter in parameters:
        value = parameter.asnumpy()
        arrays.update(zip(held.names(parameter), value if _EXPERTS in parameter.name else [value]))
    return arrays


def set_parameters(
    parameters: Iterable[Parameter], arrays: Mapping[str, np.ndarray], origin: str, held: Held
) -> None:
    """The inverse of `named_arrays`.

    Raises CheckpointError naming the first weight that is missing, left over or of another shape.
    """
    left = set(arrays)
    for parameter in parameters:
        names = held.names(parameter)
        missing = [name for name in names if name not in arrays]
        if missing:
            raise CheckpointError(f"{origin} is of another model: it has no {missing[0]}")
        values = [arrays[name] for name in names]
        for piece in held.slices(parameter):
            values = [_part(value, piece, name, origin) for name, value in zip(names, values)]
        value = np.stack(values) if _EXPERTS in parameter.name else values[0]
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"{origin} is of another model: {names[0]} gives {parameter.name} the "
                f"shape {list(value.shape)}, not {list(parameter.shape)}"
            )
        parameter.set_data(Tensor(value))
        left.difference_update(names)
    if left:
        raise CheckpointError(f"{origin} is of another model: {min(left)} has no place in this one")


class Shards(Mapping[str, np.ndarray]):
    """The arrays of a checkpoint by name, each read when it is asked for, whole: slices of a
    tensor-parallel job are put together.

    A rank reads the experts it holds and no others, one array at a time.

    Args:
        files: those of all ranks that wrote.
        held: list no experts that are elsewhere; None: list all.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, files: Iterable[Path], held: Optional[Held] = None) -> None:
        self._files: Dict[
            str, Dict[Tuple[int, ...], Path]
        ] = {}  # those with a slice of it, by its places
        self._cuts: Dict[str, List[Cut]] = {}
        for file in files:
            keys, slices = contents(file)
            for key in keys:
                if held is not None and held.elsewhere(key):
                    continue
                own = slices.get(key, [])
                self._cuts[key] = [Cut(axis, blocks) for axis, blocks, _ in own]
                self._files.setdefault(key, {})[tuple(position for _, _, position in own)] = file

    def __getitem__(self, key: str) -> np.ndarray:
        return self._whole(key, ())

    def _whole(self, key: str, positions: Tuple[int, ...]) -> np.ndarray:
        """The array, or its slice at these positions, from the files that have parts of it."""
        files = self._files[key]
        level = len(positions)
        if positions in files:
            return _read(files[positions], key)
        next_positions = sorted({own[level] for own in files if own[:level] == positions})
        return self._cuts[key][level].whole(
            [self._whole(key, (*positions, position)) for position in next_positions]
        )

    def __contains__(self, key: object) -> bool:
        return key in self._files  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def contents(file: Path) -> tuple[list[str], dict[str, list[list[int]]]]:
    """The names of a file's arrays, and of those that are slices axis, blocks and position, or of
    slices of slices each of both.

    Raises CheckpointError.
    """
    try:
        with safe_open(file, framework="numpy") as archive:
            return list(archive.keys()), json.loads((archive.metadata() or {}).get("slices", "{}"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from None


def _slices(parameters: Iterable[Parameter], held: Held) -> dict[str, list[list[int]]]:
    """For each array that is a slice: axis, blocks, and which position's it is; then the same of
    the piece that it is of this slice.
    """
    found = {}
    for parameter in parameters:
        slices = [
            [piece.cut.axis, piece.cut.blocks, piece.position] for piece in held.slices(parameter)
        ]
        found.update({name: slices for name in held.names(parameter) if slices})
    return found


def _part(value: np.ndarray, piece: Piece, name: str, origin: str) -> np.ndarray:
    cut = piece.cut
    if value.ndim <= cut.axis or value.shape[cut.axis] % (cut.blocks * piece.count):
        raise CheckpointError(
            f"{origin} is of another model: {name} has the shape {list(value.shape)}"
        )
    return piece.of(value)


def _read(file: Path, key: str) -> np.ndarray:
    with safe_open(file, framework="numpy") as archive:
        return np.asarray(archive.get_tensor(key))


def _layer(name: str) -> str:
    """The layer that a weight or its moment belongs to: blocks.3.moe."""
    return name[name.index("blocks.") : name.index(_EXPERTS)]
