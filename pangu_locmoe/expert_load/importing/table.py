"""Counts as a long CSV table: one line for each step, layer, expert and, with a column `rank` or
`node`, source; experts that are not listed have 0:
    step,layer,expert,tokens
    0,3,5,2
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Optional

from pangu_locmoe.expert_load.importing.counts import Group, read_groups
from pangu_locmoe.expert_load.importing.limits import LineError, Options
from pangu_locmoe.expert_load.importing.lines import numbered_lines
from pangu_locmoe.expert_load.trace import Trace

# the line's number, step, layer, node, expert, tokens
Row = tuple[int, int, int, Optional[int], int, int]

BLOCK = 4096  # rows that are added at once


COLUMNS = ("step", "layer", "expert", "tokens")
SOURCES = ("rank", "node")


def read(files: Sequence[Path], options: Options) -> Trace:
    """Lines of all files add up, in any order. Raises DataError."""
    return read_groups(files, options, lambda path: _groups(path, options.ranks_per_node))


def _groups(path: Path, ranks_per_node: int) -> Iterator[Group]:
    def keyed() -> Iterator[Row]:
        for line, values, source in rows_of(path, COLUMNS, SOURCES):
            step, layer, expert, tokens = values[:4]
            divisor = ranks_per_node if source == "rank" else 1
            yield line, step, layer, values[4] // divisor if source else None, expert, tokens

    return grouped(keyed())


def grouped(rows: Iterable[Row]) -> Iterator[Group]:
    """Neighbouring rows of the same step, layer and source at once: NumPy adds them faster than
    one by one.
    """
    for (step, layer, node), group in groupby(rows, key=lambda row: row[1:4]):
        # a whole file of one key must not become one block
        while block := list(islice(group, BLOCK)):
            experts = [row[4] for row in block]
            yield block[-1][0], step, layer, node, experts, [row[5] for row in block]


def rows_of(
    path: Path, columns: Sequence[str], sources: Sequence[str] = ()
) -> Iterator[tuple[int, list[int], str | None]]:
    """Each line's number, its cells in the order of `columns`, and which of `sources` is the name
    of the cell after them; None: there is none.

    Raises LineError: another header, or a cell that is not a whole number.
    """
    numbers: list[int] = []
    reader = _cells(path, numbers)
    header = [name.strip() for name in next(reader, [])]
    given = [name for name in sources if name in header]
    names = [*columns, *given]
    if sorted(header) != sorted(names) or len(given) > 1:
        also = f" and may have {' or '.join(sources)}" if sources else ""
        raise LineError(
            1, f"the header must be {','.join(columns)}{also}, is {','.join(header)[:80]!r}"
        )
    places = [header.index(name) for name in names]
    for cells in reader:
        if len(cells) != len(header):
            raise LineError(numbers[0], f"has {len(cells)} cells, the header has {len(header)}")
        values = [_whole(numbers[0], name, cells[place]) for name, place in zip(names, places)]
        yield numbers[0], values, given[0] if given else None


def _cells(path: Path, numbers: list[int]) -> Iterator[list[str]]:
    """Lines as lists of cells; `numbers` holds the number of the last line that was read."""

    def texts() -> Iterator[str]:
        for number, text in numbered_lines(path):
            numbers[:] = [number]
            if "\r" in text.rstrip("\r\n"):
                raise LineError(
                    number, "has a carriage return within it; a line must end in a line feed"
                )
            yield text

    try:
        yield from csv.reader(texts(), strict=True)
    except csv.Error as error:
        raise LineError(numbers[0], f"not CSV: {error}") from None


def _whole(line: int, name: str, cell: str) -> int:
    text = cell.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise LineError(line, f"{name} must be a whole number from 0 to 10^18, is {cell[:40]!r}")
    return int(text)
