"""SGLang's expert distribution recorder: expert_distribution_recorder_TIME.pt.

Mode `stat` (or `stat_approx`), one file of rank 0, its counts summed over ranks and over slots:
    {"rank": 0, "logical_count": int32 [passes, layers, experts], ...}
The buffer has a fixed number of passes; those at its end that were not used are zeros and are left
out. Passes have no numbers: they are steps 0, 1, ...

Modes `per_pass` and `per_token`, one file for each rank:
    {"records": [{"forward_pass_id": 7, "rank": 0, "gatherer_key": "primary",
                  "global_physical_count": int [layers, slots]}, ...],
     "last_physical_to_logical_map": int [layers, slots]}
Older files of `per_token` have topk_ids_of_layer [layers, tokens, choices], slots or -1, instead of
the counts. What the reader of SGLang's EPLB simulator makes of all ranks' files is read too:
    {"global_physical_count_of_forward_pass": int [passes, layers, slots],
     "forward_pass_ids": [7, ...], "last_physical_to_logical_map": int [layers, slots]}
Layers are all hidden layers of the model; dense ones have no tokens.

A rank counts the tokens that it routes, which then come from its node; behind DeepEP's low latency
it counts those that its own slots receive, and nothing is known of their nodes.

Letters: W rows (passes), L layers, N nodes, R ranks, E experts, P expert slots, T tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.importing.arrays import (
    Ints,
    array_of,
    by_expert,
    check_size,
    counts_of,
    index_of,
    map_of,
    number_of_experts,
    padded,
    trace_of,
)
from pangu_locmoe.expert_load.importing.limits import LARGEST_INDEX, Options, naming
from pangu_locmoe.expert_load.torch_file import read_torch
from pangu_locmoe.expert_load.trace import LARGEST, Trace

MAPS = ("last_physical_to_logical_map", "physical_to_logical_map")
AXES = ("passes", "layers", "experts")
SIMULATOR = "global_physical_count_of_forward_pass"


@dataclass(frozen=True)
class _Pass:
    """One rank's counts of one forward pass, with the map of its file."""

    number: int
    rank: int
    count_LP: Ints
    map_LP: Ints


def read(files: Sequence[Path], options: Options) -> Trace:
    """All files must be of one mode. Raises DataError that names the file and the key."""
    contents = []
    for path in files:
        with naming(path):
            contents.append(_content(path))
    if all("logical_count" in content for content in contents):
        return _summed(files, contents, options)
    passes: dict[tuple[int, int, str], _Pass] = {}
    for path, content in zip(files, contents):
        with naming(path):
            for key, one in _passes(content, options):
                if key in passes:
                    raise DataError(f"forward pass {key[0]} of rank {key[1]} is there twice")
                passes[key] = one
    with naming(files[0]):
        return _by_pass(list(passes.values()), options)


def _content(path: Path) -> dict[Any, Any]:
    content = read_torch(path)
    if not isinstance(content, dict):
        raise DataError(f"holds a {type(content).__name__}, not what the recorder dumps")
    if SIMULATOR in content:
        return {**content, "records": _simulated(content)}
    if "logical_count" not in content and "records" not in content:
        raise DataError(
            f"has neither logical_count nor records, has {', '.join(map(str, content))[:80]}"
        )
    return content


def _simulated(content: dict[Any, Any]) -> list[dict[str, Any]]:
    """The simulator's table as records of one rank."""
    count_WLP = array_of(SIMULATOR, content[SIMULATOR], ("passes", "layers", "slots"))
    numbers = content.get("forward_pass_ids")
    if not isinstance(numbers, list) or len(numbers) != len(count_WLP):
        raise DataError(f"forward_pass_ids must be a list of {len(count_WLP)} integers")
    return [
        {"forward_pass_id": number, "global_physical_count": count_LP}
        for number, count_LP in zip(numbers, count_WLP)
    ]


def _summed(files: Sequence[Path], contents: list[dict[Any, Any]], options: Options) -> Trace:
    """Mode `stat`: the dumps of a rank follow each other."""
    dumps: list[dict[int, Ints]] = []
    for path, content in zip(files, contents):
        with naming(path):
            rank, count_WLE = _stat(content)
            first = next(iter(dumps[0].values())) if dumps else count_WLE
            if count_WLE.shape[1:] != first.shape[1:]:
                raise DataError(
                    f"logical_count has {list(count_WLE.shape[1:])} layers and experts, "
                    f"the first file {list(first.shape[1:])}"
                )
            place = sum(rank in dump for dump in dumps)
            if place == len(dumps):
                dumps.append({})
            dumps[place][rank] = count_WLE
    with naming(files[0]):
        load_WLE = np.concatenate([_merged(list(dump.values())) for dump in dumps])
        load_WLE = padded(load_WLE, options.num_experts)
        return trace_of(range(len(load_WLE)), load_WLE[:, :, None], sourced=False)


def _stat(content: dict[Any, Any]) -> tuple[int, Ints]:
    """Rank and counts [W, L, E]."""
    count_WLE = counts_of("logical_count", content["logical_count"], AXES)
    if not count_WLE.any():
        raise DataError("logical_count has no tokens in any pass")
    return index_of("rank", content.get("rank", 0), 0, LARGEST_INDEX), count_WLE


def _merged(of_rank: list[Ints]) -> Ints:
    """What ranks dumped of the same passes: the same sum, or counts that add up. Without the unused
    end of the buffer.
    """
    first, *others = of_rank
    if any(other.shape != first.shape for other in others):
        passes = ", ".join(str(len(count_WLE)) for count_WLE in of_rank)
        raise DataError(f"ranks have {passes} passes in one dump")
    if any((other != first).any() for other in others):
        first = first + sum(others)
    return first[: np.flatnonzero(first.any(axis=(1, 2)))[-1] + 1]


def _passes(content: dict[Any, Any], options: Options) -> list[tuple[tuple[int, int, str], _Pass]]:
    records = content.get("records")
    if not isinstance(records, list):
        raise DataError("has logical_count or records in some files and not in others")
    if not records:
        raise DataError("records is empty")
    name = next((name for name in MAPS if name in content), MAPS[0])
    map_LP = array_of(name, content.get(name), ("layers", "slots"))
    map_LP = map_of(name, map_LP, map_LP.shape, options.num_experts)
    found = []
    for place, record in enumerate(records):
        where = f"records[{place}]"
        if not isinstance(record, dict):
            raise DataError(f"{where} must be a dict")
        number = index_of(f"{where}.forward_pass_id", record.get("forward_pass_id"), 0, LARGEST)
        rank = index_of(f"{where}.rank", record.get("rank", 0), 0, LARGEST_INDEX)
        count_LP = _count(where, record, map_LP)
        key = (number, rank, str(record.get("gatherer_key")))
        found.append((key, _Pass(number, rank, count_LP, map_LP)))
    return found


def _count(where: str, record: dict[Any, Any], map_LP: Ints) -> Ints:
    """Of one record by slot, int64 [L, P]."""
    if "topk_ids_of_layer" in record and "global_physical_count" not in record:
        return _counted(f"{where}.topk_ids_of_layer", record["topk_ids_of_layer"], map_LP.shape)
    name = f"{where}.global_physical_count"
    count_LP = counts_of(name, record.get("global_physical_count"), ("layers", "slots"))
    if count_LP.shape != map_LP.shape:
        raise DataError(f"{name} has shape {list(count_LP.shape)}, the map {list(map_LP.shape)}")
    return count_LP


def _counted(name: str, value: Any, shape: tuple[int, ...]) -> Ints:
    if getattr(value, "size", 1) == 0:  # a pass without tokens
        return np.zeros(shape, np.int64)
    slot_LTK = array_of(name, value, ("layers", "tokens", "choices"))
    whole = slot_LTK.dtype.kind in "iu"
    if len(slot_LTK) != shape[0] or not whole or slot_LTK.max() >= shape[1] or slot_LTK.min() < -1:
        raise DataError(f"{name} must be slots 0 to {shape[1] - 1} of {shape[0]} layers, or -1")
    count_LP = np.empty(shape, np.int64)
    for layer, slot_TK in enumerate(slot_LTK):
        count_LP[layer] = np.bincount(slot_TK[slot_TK >= 0], minlength=shape[1])
    return count_LP


def _by_pass(passes: list[_Pass], options: Options) -> Trace:
    ranks = sorted({one.rank for one in passes})
    steps = sorted({one.number for one in passes})
    shapes = {one.map_LP.shape for one in passes}
    if len(shapes) > 1:
        raise DataError(f"files have maps of different shapes: {', '.join(map(str, shapes))}")
    largest = max(int(one.map_LP.max()) for one in passes)
    num_experts = number_of_experts(options.num_experts, largest + 1, "the map")
    sourced = len(ranks) > 1 and not _received(passes, ranks)
    nodes = ranks[-1] // options.ranks_per_node + 1 if sourced else 1
    layers, slots = passes[0].map_LP.shape
    check_size(len(steps), layers, nodes, max(num_experts, slots))
    row_of = {step: row for row, step in enumerate(steps)}
    count_WNLE = np.zeros((len(steps), nodes, layers, num_experts), np.int64)
    for map_bytes in {one.map_LP.tobytes() for one in passes}:  # one, unless experts moved
        count_WNLP = np.zeros((len(steps), nodes, layers, slots), np.int64)
        for one in passes:
            if one.map_LP.tobytes() == map_bytes:
                node = one.rank // options.ranks_per_node if sourced else 0
                count_WNLP[row_of[one.number], node] += one.count_LP
        map_LP = np.frombuffer(map_bytes, np.int64).reshape(layers, slots)
        count_WNLE += by_expert(count_WNLP, map_LP, num_experts)
    return trace_of(steps, count_WNLE.swapaxes(1, 2), sourced)


def _received(passes: list[_Pass], ranks: list[int]) -> bool:
    """Whether every rank has counts in its own slots alone: they are of what it received."""
    slots = passes[0].count_LP.shape[1]
    if slots % (ranks[-1] + 1):
        return False
    rank_P = np.arange(slots) * (ranks[-1] + 1) // slots
    return not any(one.count_LP[:, rank_P != one.rank].any() for one in passes)
