"""Checkpoints: one folder each, whole or not there.

model.safetensors       weights, experts by their global id: blocks.3.moe.experts.5.w_in
model-rankR.safetensors, optimizer-rankR.safetensors   the experts of rank R, its slices, and its pieces of moments, where a job of
                        several ranks wrote it; the header's `slices` say of what array each is
                        which part
optimizer.safetensors   Adam's moments by weight: adam_m.NAME, adam_v.NAME (absent from inherited and extracted models)
state.json              step, data position and identity, loss scale, capacities, best validation loss
config.yaml, tokenizer.json   what it takes to evaluate and to generate
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Mapping, Optional, Protocol, Sequence

import numpy as np
from mindspore import Parameter, nn
from safetensors import SafetensorError, safe_open

from pangu_locmoe.checkpoint.shards import Held, Shards, contents, save_arrays, set_parameters
from pangu_locmoe.config import Config
from pangu_locmoe.config.stored import load_stored_config
from pangu_locmoe.data.identity import Identity, differences, tokenizer_digest
from pangu_locmoe.data.prepared import Prepared
from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.files import json_text
from pangu_locmoe.parallel.agreement import together
from pangu_locmoe.parallel.gradients import kind
from pangu_locmoe.parallel.tensor import piece_of
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.parallel.world import World

PARTS = ("model", "optimizer")
WEIGHTS = ("model",)  # enough to evaluate, to generate, and to make other models from

_CHECKPOINT = re.compile(r"step-([0-9]{8,})")
_HALF_WRITTEN = re.compile(r"\.step-([0-9]{8,})")
_PUT_ASIDE = re.compile(r"\.step-([0-9]{8,})\.old")  # the one that is replaced


class OptimizerState(Protocol):
    """What a checkpoint keeps of an optimizer.

    state: its moments by name, of this rank.
    divided: for each parameter whether the ranks that hold it have a piece of its moments each.
    """

    @property
    def state(self) -> Sequence[Parameter]: ...

    @property
    def divided(self) -> Sequence[bool]: ...


def save_checkpoint(
    folder: Path,
    config: Config,
    tokenizer_file: Optional[Path],
    model: nn.Cell,
    optimizer: Optional[OptimizerState] = None,
    state: Optional[Mapping[str, Any]] = None,
    world: Optional[World] = None,
) -> None:
    """Write beside, fsync, rename.

    Raises CheckpointError when it cannot be written; an older one stays as it was.

    In a job the ranks of the first `expert_parallel` replicas write their own experts and slices,
    every rank its pieces of moments, and rank 0 everything else, to a folder that all ranks see.
    What one rank cannot write, all ranks raise.
    """
    world = world or World.of(config)
    rank = world.communicator.rank
    topology = world.topology
    communicator = world.communicator
    shards = (
        topology.expert_parallel * topology.tensor_parallel if world.exchange is not None else 1
    )
    arrays: Dict[str, Sequence[Parameter]] = {"model": list(model.get_parameters())}
    files = {"model": shards}
    if optimizer is not None:
        arrays["optimizer"] = optimizer.state
        files["optimizer"] = topology.num_ranks if any(optimizer.divided) else shards
    temporary = folder.parent / f".{folder.name}"
    try:
        with together(communicator), _writing(folder):
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with together(communicator), _writing(folder):
            for name, parameters in arrays.items():
                if rank < files[name]:
                    file = temporary / shard_name(name, rank)
                    save_arrays(
                        [p for p in parameters if _writes(p, rank, topology)], Held.by(model), file
                    )
                    _sync(file)
            if rank == 0:
                texts = {
                    "state.json": json_text({"step": 0, **(state or {}), "shards": files}),
                    "config.yaml": config.to_yaml(),
                }
                if tokenizer_file is not None:
                    texts["tokenizer.json"] = tokenizer_file.read_text(encoding="utf-8")
                for name, text in texts.items():
                    (temporary / name).write_text(text, encoding="utf-8")
                    _sync(temporary / name)
        with together(communicator), _writing(folder):
            if rank == 0:
                _publish(temporary, folder)
    except CheckpointError:
        if rank == 0:  # no rank writes any more: all of them are here
            shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be written: {error}") from None


def _publish(temporary: Path, folder: Path) -> None:
    """Put a whole folder in its place.

    One that is there is put aside until then; `recover` brings it back after a crash in between.
    """
    aside = folder.parent / f".{folder.name}.old"
    shutil.rmtree(aside, ignore_errors=True)
    replaces = folder.is_dir() and not folder.is_symlink()
    if replaces:
        folder.rename(aside)
    try:
        temporary.rename(folder)
    except OSError:
        if replaces:
            aside.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def shard_name(name: str, rank: int) -> str:
    """The file of one rank's part: model.safetensors, model-rank1.safetensors, ..."""
    return f"{name}.safetensors" if rank == 0 else f"{name}-rank{rank}.safetensors"


def read_shards(folder: Path, name: str, held: Optional[Held] = None) -> Shards:
    """The arrays of a checkpoint's "model" or "optimizer", whatever number of ranks wrote them.

    Raises CheckpointError.
    """
    return Shards(_files(folder, name), held)


def load_weights(folder: Path, model: nn.Cell) -> None:
    """Load a checkpoint's weights into a model, or into one rank's part of it, whatever number of
    ranks wrote it.

    Raises:
        CheckpointError: it is damaged, lacks a rank's file, or is of another model.
    """
    _load(folder, "model", model.get_parameters(), Held.by(model))


def load_optimizer(folder: Path, optimizer: OptimizerState, held: Held) -> None:
    """Load Adam's moments of the experts in `held`; as `load_weights`."""
    _load(folder, "optimizer", optimizer.state, held)


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's state.json. Raises CheckpointError if it is not a checkpoint."""
    file = folder / "state.json"
    try:
        state = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint: {error}") from None
    if not isinstance(state, dict) or not _whole_number(state.get("step"), 0):
        raise CheckpointError(f"{folder} is not a checkpoint: state.json has no step")
    shards = state.get("shards", {})
    if not isinstance(shards, dict) or not all(
        _whole_number(count, 1) for count in shards.values()
    ):
        raise CheckpointError(
            f"{folder} is not a checkpoint: state.json has no numbers of files in shards"
        )
    return state


def read_config(folder: Path) -> Config:
    """The configuration a checkpoint was trained with."""
    return load_stored_config(folder / "config.yaml")


def check_tokenizer(folder: Path, tokenizer_file: Path) -> None:
    """Raises CheckpointError where a checkpoint was trained with another tokenizer: its token
    ids would mean other text.
    """
    own = folder / "tokenizer.json"
    if own.exists() and not same_tokenizer(own, tokenizer_file):
        raise CheckpointError(
            f"{folder} was trained with another tokenizer than this run's; set data.tokenizer={own}"
        )


def same_tokenizer(first: Path, second: Path) -> bool:
    """Whether two tokenizer.json say the same. Raises CheckpointError where one cannot be read."""
    return _tokenizer_digest(first) == _tokenizer_digest(second)


def own_tokenizer(folder: Path) -> Path:
    """A checkpoint's tokenizer.json.

    Raises CheckpointError where it is missing or not the one its weights were trained with.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing: the checkpoint's weights mean nothing without its tokenizer"
        )
    identity = read_identity(folder)
    if identity is not None and identity["tokenizer"] != _tokenizer_digest(file):
        raise CheckpointError(
            f"{file} is not the tokenizer the checkpoint was trained with: its weights "
            "mean nothing with another"
        )
    return file


def read_identity(folder: Path) -> Optional[Identity]:
    """The data a checkpoint's weights were trained on; None where an older version wrote it,
    which did not say.
    """
    identity = read_state(folder).get("identity")
    return identity if isinstance(identity, dict) else None


def _tokenizer_digest(file: Path) -> str:
    try:
        return tokenizer_digest(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file. Raises CheckpointError if it is missing or truncated."""
    try:
        with safe_open(file, framework="numpy") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from None


def step_folders(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first: folders, not links, of exactly the names that runs give;
    all else is somebody's own.

    One that a crash caught while it was replaced is found where it was put aside.
    """
    found: dict[int, Path] = {}
    for step, path in sorted(_entries(run_dir, _PUT_ASIDE)) + sorted(
        _entries(run_dir, _CHECKPOINT)
    ):
        found[step] = path
    return [found[step] for step in sorted(found)]


def recover(run_dir: Path) -> list[str]:
    """Clear away what a crash left half-written and put back what it left put aside.

    Returns a line for each that could not be.
    """
    notes = []
    for _, path in _entries(run_dir, _HALF_WRITTEN):
        notes += _removing(path)
    for _, path in _entries(run_dir, _PUT_ASIDE):
        folder = path.with_name(path.name[1:].partition(".")[0])
        if os.path.lexists(folder):
            notes += _removing(path)
        else:
            with suppress(OSError):  # it is found where it is, too
                path.rename(folder)
    return notes


def latest_whole_checkpoint(run_dir: Path, parts: Sequence[str] = PARTS) -> Optional[Path]:
    """The newest checkpoint of which every file of `parts` can be opened, or None.

    A damaged one is passed over.
    """
    return next(
        (folder for folder in reversed(step_folders(run_dir)) if damage(folder, parts) is None),
        None,
    )


def passed_over(run_dir: Path, folder: Path, parts: Sequence[str] = PARTS) -> list[str]:
    """A line for each damaged checkpoint of a run that is newer than `folder`; none where
    `run_dir` is a checkpoint itself.
    """
    newer = [other for other in step_folders(run_dir) if other.name > folder.name]
    return [
        f"{other.name} is passed over: {problem}"
        for other in newer
        for problem in [damage(other, parts)]
        if problem
    ]


def damage(folder: Path, parts: Sequence[str] = PARTS) -> Optional[str]:
    """What is wrong with a checkpoint's `parts`, in a line; None for a whole one."""
    try:
        for name in parts:
            for file in _files(folder, name):
                contents(file)
    except CheckpointError as error:
        return str(error)
    return None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder from itself or from a run directory (the newest with whole weights, which
    is all it is for).

    Raises:
        CheckpointError: there is none.
    """
    if (path / "model.safetensors").is_file():
        return path
    folder = latest_whole_checkpoint(path, WEIGHTS)
    if folder is None:
        broken = [
            problem
            for other in step_folders(path)[-1:]
            for problem in [damage(other, WEIGHTS)]
            if problem
        ]
        raise CheckpointError(
            broken[0] if broken else f"{path} is neither a checkpoint nor a run directory with one"
        )
    return folder


def check_data(folder: Path, prepared: Prepared) -> list[str]:
    """Compare a run's data with what its checkpoint was trained on; returns a note where that
    cannot be known.

    Raises:
        CheckpointError: it is other text, or cut or tokenized otherwise.
    """
    before = read_identity(folder)
    if before is None:
        check_tokenizer(folder, prepared.path / "tokenizer.json")
        return [
            (
                f"{folder} does not say what text it was trained on (an older version wrote "
                "it), so that is not compared"
            )
        ]
    changed = differences(before, prepared.identity)
    if changed:
        raise CheckpointError(
            f"{folder} was trained on other data than there is now: {', '.join(changed)} changed; "
            "put it back, or start from these weights with --init-from"
        )
    return []


def remove_old(run_dir: Path, step: int, keep: int, best_step: Optional[int]) -> list[str]:
    """Keep the newest `keep` up to `step` and the best.

    Later ones, which a resumed run passed over as damaged, do not count.

    Returns a line for each that could not be removed.
    """
    folders = dict(_entries(run_dir, _CHECKPOINT))
    notes = []
    for old in [number for number in sorted(folders) if number <= step][:-keep]:
        if old != best_step:
            notes += _removing(folders[old])
    return notes


def _entries(run_dir: Path, name: re.Pattern[str]) -> Iterator[tuple[int, Path]]:
    """Steps and folders in checkpoints/ of a name of ours."""
    folder = run_dir / "checkpoints"
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    for found in filter(None, map(name.fullmatch, names)):
        path = folder / found[0]
        if f"{int(found[1]):08d}" == found[1] and path.is_dir() and not path.is_symlink():
            yield int(found[1]), path


def _removing(folder: Path) -> list[str]:
    """Remove a folder of ours; a line about it where that fails."""
    try:
        (folder / "state.json").unlink(
            missing_ok=True
        )  # first: what is left of an interrupted removal is no checkpoint
        shutil.rmtree(folder)
    except OSError as error:
        return [f"{folder} cannot be removed: {error.strerror or error}"]
    return []


def _whole_number(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _writes(parameter: Parameter, rank: int, topology: Topology) -> bool:
    """Whether this rank's file has it: every expert, every slice and every piece is in one file."""
    if piece_of(parameter) is not None:
        return True
    if rank >= topology.expert_parallel * topology.tensor_parallel:
        return False
    writer = {"whole": rank == 0, "slice": rank < topology.tensor_parallel, "expert": True}
    return writer[kind(parameter)]


def _files(folder: Path, name: str) -> list[Path]:
    """The files of all ranks that wrote a checkpoint."""
    return [
        folder / shard_name(name, rank)
        for rank in range(read_state(folder).get("shards", {}).get(name, 1))
    ]


def _load(folder: Path, name: str, parameters: Iterable[Parameter], held: Held) -> None:
    set_parameters(
        parameters, read_shards(folder, name, held), str(folder / shard_name(name, 0)), held
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
