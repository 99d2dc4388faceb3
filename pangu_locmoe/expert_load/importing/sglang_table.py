"""SGLang's expert distribution before its .pt files: expert_distribution_rankR_timestampT.csv.

One file for each rank and dump, one line for each layer and expert with tokens:
    layer_id,expert_id,count
    3,18,39249
The name has the rank and the time. The dumps of a rank, by their time, are steps 0, 1, ...; files
whose name has no rank are one step. Of these, and of one rank alone, no nodes are known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

from pangu_locmoe.expert_load.importing.counts import Group, read_groups
from pangu_locmoe.expert_load.importing.limits import Options
from pangu_locmoe.expert_load.importing.table import Row, grouped, rows_of
from pangu_locmoe.expert_load.trace import Trace

COLUMNS = ("layer_id", "expert_id", "count")
NAME = re.compile(r"rank_?(\d{1,9})_timestamp_?(\d+(?:\.\d+)?)", re.IGNORECASE | re.ASCII)


def read(files: Sequence[Path], options: Options) -> Trace:
    """Counts of the ranks of a step add up. Raises DataError that names the file and the line."""
    place_of = _places(files)

    def groups(path: Path) -> Iterator[Group]:
        step, rank = place_of[path]
        node = None if rank is None else rank // options.ranks_per_node
        rows: Iterator[Row] = (
            (line, step, layer, node, expert, tokens)
            for line, (layer, expert, tokens), _ in rows_of(path, COLUMNS)
        )
        return grouped(rows)

    return read_groups(files, options, groups)


def _places(files: Sequence[Path]) -> dict[Path, tuple[int, Optional[int]]]:
    """Step and rank of each file."""
    found = {path: NAME.search(path.name) for path in files}
    times: dict[int, list[tuple[float, Path]]] = {}
    for path, match in found.items():
        if match is None:
            return {path: (0, None) for path in files}
        times.setdefault(int(match[1]), []).append((float(match[2]), path))
    alone = len(times) == 1
    return {
        path: (step, None if alone else rank)
        for rank, dumps in times.items()
        for step, (_, path) in enumerate(sorted(dumps))
    }
