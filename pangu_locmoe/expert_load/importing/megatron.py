"""Routing decisions as JSON lines, one for each step, layer and rank: a router trace of Megatron.

Other keys are ignored; every index counts one token, so top-k gives k counts a token:
    {"step": 0, "layer": 3, "rank": 1, "top_indices": [[5, 0], [2, 5]]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pangu_locmoe.expert_load.importing.counts import Group, read_groups
from pangu_locmoe.expert_load.importing.limits import LineError, Options
from pangu_locmoe.expert_load.importing.lines import numbered_lines
from pangu_locmoe.expert_load.trace import Trace


def read(files: Sequence[Path], options: Options) -> Trace:
    """Lines of all files add up, in any order. Raises DataError."""
    return read_groups(files, options, lambda path: _groups(path, options.ranks_per_node))


def _groups(path: Path, ranks_per_node: int) -> Iterator[Group]:
    for line, text in numbered_lines(path):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LineError(
                line, f"not JSON: {error}; the name of a CSV table ends in .csv or .csv.gz"
            ) from None
        if type(row) is not dict:
            raise LineError(line, "not a JSON object")
        step, layer = (_integer(line, key, row.get(key)) for key in ("step", "layer"))
        node = _integer(line, "rank", row["rank"]) // ranks_per_node if "rank" in row else None
        yield line, step, layer, node, _flat(line, row.get("top_indices")), None


def _integer(line: int, key: str, value: Any) -> int:
    """`type` and not isinstance: True is no integer here."""
    if type(value) is not int:
        raise LineError(line, f"{key} must be an integer, is {json.dumps(value)[:40]}")
    return value


def _flat(line: int, indices: Any) -> list[int]:
    """Expert indices of all tokens in one list."""
    if (
        type(indices) is list
        and indices
        and type(indices[0]) is list
        and set(map(type, indices)) == {list}
    ):
        indices = list(chain.from_iterable(indices))
    if type(indices) is not list or not set(map(type, indices)) <= {int}:
        raise LineError(line, "top_indices must be a list of integers, or of lists of integers")
    return indices
