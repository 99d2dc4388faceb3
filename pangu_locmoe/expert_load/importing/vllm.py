"""vLLM's expert load, as its EPLB state writes it for a model while it logs the balance.

One JSON object, or JSON lines with one snapshot and the model's keys in each:
    {"num_logical_experts": 4, "window_size": 100, ...,
     "snapshots": [{"step": 3000, "window_expert_load": [[9, 1, 5, 0, 2, 4], ...],
                    "physical_to_logical_map": [[0, 1, 2, 3, 0, 1], ...]}, ...]}
`window_expert_load` [layers, slots] is summed over the ranks and over the last `window_size` steps;
`latest_expert_load` is of the last step alone and is not read. The map is that of the snapshot.
Nothing is known of the nodes that tokens come from.

Letters: W rows (snapshots), L layers, E experts, P expert slots.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pangu_locmoe.errors import DataError, one_line
from pangu_locmoe.expert_load.importing.arrays import (
    Ints,
    by_expert,
    check_size,
    counts_of,
    index_of,
    map_of,
    number_of_experts,
    trace_of,
)
from pangu_locmoe.expert_load.importing.limits import (
    LARGEST_INDEX,
    LARGEST_LINE,
    LineError,
    Options,
    naming,
)
from pangu_locmoe.expert_load.importing.lines import numbered_lines, opened
from pangu_locmoe.expert_load.trace import LARGEST, Trace

LOAD = "window_expert_load"
MAP = "physical_to_logical_map"


def read(files: Sequence[Path], options: Options) -> Trace:
    """Snapshots of all files, by their step; one that is there twice counts once. Raises DataError
    that names the file and the key.
    """
    found: dict[int, Ints] = {}
    for path in files:
        with naming(path):
            for where, snapshot, model in _snapshots(path):
                step, load_LE = _load(where, snapshot, model, options)
                check_size(len(found) + 1, *load_LE.shape)
                first = next(iter(found.values()), load_LE)
                if load_LE.shape != first.shape:
                    raise DataError(
                        f"{where} has layers and experts {list(load_LE.shape)}, "
                        f"the first snapshot {list(first.shape)}"
                    )
                if (found.setdefault(step, load_LE) != load_LE).any():
                    raise DataError(f"{where}: step {step} is there twice, with different loads")
    with naming(files[0]):
        load_WLE = np.stack(list(found.values()))
        return trace_of(list(found), load_WLE[:, :, None], sourced=False)


def _snapshots(path: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """How to name it, the snapshot, and the object with the model's keys."""
    content = _whole(path)
    if content is None:
        for line, text in numbered_lines(path):
            record = _parsed(line, text)
            if not isinstance(record, dict):
                raise LineError(line, "not a JSON object")
            yield f"line {line}", record, record
        return
    snapshots = content.get("snapshots", [content] if LOAD in content else None)
    if not isinstance(snapshots, list):
        raise DataError(f"snapshots must be a list, is {_type(snapshots)}")
    if not snapshots:
        raise DataError("snapshots is empty")
    for place, snapshot in enumerate(snapshots):
        if not isinstance(snapshot, dict):
            raise DataError(f"snapshots[{place}] must be an object, is {_type(snapshot)}")
        yield f"snapshots[{place}]", snapshot, content


def _whole(path: Path) -> dict[str, Any] | None:
    """The file as one JSON object; None: it is several lines of JSON. Raises DataError."""
    with opened(path) as file:
        content = file.read(LARGEST_LINE + 1)
    if len(content) > LARGEST_LINE:
        raise DataError(f"has more than {LARGEST_LINE >> 20} MiB; JSON lines may have more")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            return None
        raise DataError(f"not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise DataError(f"must be a JSON object, is {_type(value)}")
    return value


def _parsed(line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineError(line, f"not JSON: {error}") from None


def _load(
    where: str, snapshot: dict[str, Any], model: dict[str, Any], options: Options
) -> tuple[int, Ints]:
    """Step and loads [L, E] of one snapshot."""
    step = index_of(f"{where}.step", snapshot.get("step"), 0, LARGEST)
    load_LP = counts_of(f"{where}.{LOAD}", snapshot.get(LOAD), ("layers", "slots"))
    told = model.get("num_logical_experts")
    if told is not None:
        told = index_of("num_logical_experts", told, 1, LARGEST_INDEX + 1)
    given = options.num_experts
    if None not in (given, told) and given != told:
        raise DataError(f"num_logical_experts is {told}, num_experts says {given}")
    name = f"{where}.{MAP}"
    map_LP = map_of(name, snapshot.get(MAP, model.get(MAP)), load_LP.shape, told or given)
    num_experts = number_of_experts(told or given, int(map_LP.max()) + 1, name)
    return step, by_expert(load_LP, map_LP, num_experts)


def _type(value: Any) -> str:
    return "absent" if value is None else type(value).__name__
