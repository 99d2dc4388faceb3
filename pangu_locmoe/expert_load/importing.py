"""Load traces of other frameworks: routing decisions as JSON lines, or counts as a long CSV table,
plain or gzipped. NumPy only.

JSONL, one line per step, layer and rank (other keys are ignored); every index counts one token, so
    top-k gives k counts a token: {"step": 0, "layer": 3, "rank": 1, "top_indices": [[5, 0], [2,
    5]]} CSV, one line per step, layer, expert and, if there is a column `rank` or `node`, source;
    experts that are not listed have 0:
    step,layer,expert,tokens
    0,3,5,2
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.trace import LARGEST, Trace

# of an expert, a layer or a rank. Beyond it is a mistake, and the table of counts would be huge
LARGEST_INDEX = 65_535
LARGEST_TRACE = 2**31  # counts in the trace, 8 GB as int32
LARGEST_TABLE = 2**24  # counts of one step and layer: 256 nodes of 65,536 experts
LARGEST_LINE = 2**28  # bytes
BLOCK = 4096  # CSV rows that are added at once

# What both formats become, in groups of equal step, layer and source: the last line's number, step,
# layer, rank or node, experts, tokens.
Group = tuple[int, int, int, Optional[int], "list[int]", "list[int] | None"]


class _LineError(Exception):
    def __init__(self, line: int, text: str) -> None:
        super().__init__(f"line {line}: {text}")


def import_trace(path: Path, num_experts: int | None = None, ranks_per_node: int = 1) -> Trace:
    """Read a routing trace of another framework: CSV if the name ends in .csv or .csv.gz (or .CSV),
    else JSONL.

    Layers may have any numbers: they become 0, 1, ... in rising order. Lines for the same step,
    layer and source add up, and may come in any order. Memory grows with the trace, not with the
    file.

    Args:
        num_experts: None: the largest index + 1.
        ranks_per_node: rank r is on node r // ranks_per_node; a column `node` is taken as it is.

    Returns a Trace with source_WLNE if the file names ranks or nodes, without dropped_WLE. Raises
    DataError in one line that names the line of the file, or the step and the layer that are
    missing.
    """
    for name, value in (("num_experts", num_experts), ("ranks_per_node", ranks_per_node)):
        if value is not None and not 1 <= value <= LARGEST_INDEX + 1:
            raise DataError(f"{name} {value}: must be 1 to {LARGEST_INDEX + 1}")
    counts = _Counts(num_experts)
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            lines = _decoded(gzip.GzipFile(fileobj=file) if zipped else file)
            read = _csv_groups if path.name.lower().endswith((".csv", ".csv.gz")) else _json_groups
            for group in read(lines, ranks_per_node):
                counts.add(*group)
        return counts.trace()
    except _LineError as error:
        raise DataError(f"{path}, {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


class _Counts:
    """Tokens of every step and layer, in tables [nodes, experts] that grow as larger indices
    come.
    """

    def __init__(self, num_experts: int | None) -> None:
        self._num_experts = num_experts
        self._table_NE: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._shape = (1, num_experts or 1)
        self._sourced: bool | None = None

    def add(
        self,
        line: int,
        step: int,
        layer: int,
        node: int | None,
        experts: list[int],
        tokens: list[int] | None,
    ) -> None:
        for name, value, largest in (
            ("step", step, LARGEST),
            ("layer", layer, LARGEST_INDEX),
            ("rank or node", node or 0, LARGEST_INDEX),
        ):
            if not 0 <= value <= largest:
                raise _LineError(line, f"{name} {value}: must be 0 to {largest}")
        if self._sourced not in (None, node is not None):
            raise _LineError(
                line,
                "has a rank, earlier lines have none"
                if node is not None
                else "has no rank, earlier lines have one",
            )
        self._sourced = node is not None
        top = self._num_experts - 1 if self._num_experts else LARGEST_INDEX
        wrong = [
            expert
            for expert in (min(experts, default=0), max(experts, default=0))
            if not 0 <= expert <= top
        ]
        if wrong:
            raise _LineError(line, f"expert {wrong[0]}: must be 0 to {top}")
        place = node or 0
        self._shape = (
            max(self._shape[0], place + 1),
            max(self._shape[1], max(experts, default=0) + 1),
        )
        for size, largest in ((1, LARGEST_TABLE), (len(self._table_NE), LARGEST_TRACE)):
            if size * self._shape[0] * self._shape[1] > largest:
                raise _LineError(
                    line,
                    (
                        f"{size} rows of {self._shape[0]} nodes and {self._shape[1]} experts "
                        f"are more than {largest} counts"
                    ),
                )
        table_NE = self._table_NE.get((step, layer))
        if table_NE is None or place >= len(table_NE) or self._shape[1] > table_NE.shape[1]:
            larger_NE = np.zeros(self._shape, np.int64)
            if table_NE is not None:
                larger_NE[: len(table_NE), : table_NE.shape[1]] = table_NE
            table_NE = self._table_NE[step, layer] = larger_NE
        if tokens is not None and sum(tokens) > 2**62:  # NumPy's sum would be out of int64
            raise _LineError(
                line, f"step {step}, layer {layer}: an expert has more than {LARGEST} tokens"
            )
        np.add.at(table_NE[place], experts, 1 if tokens is None else tokens)
        if table_NE[place].max() > LARGEST:
            raise _LineError(
                line, f"step {step}, layer {layer}: an expert has more than {LARGEST} tokens"
            )

    def trace(self) -> Trace:
        """All steps and layers as one table. Raises DataError if one is missing."""
        steps, layers = (sorted({key[axis] for key in self._table_NE}) for axis in (0, 1))
        if not steps:
            raise DataError("holds no rows")
        missing = next(
            (
                (step, layer)
                for step in steps
                for layer in layers
                if (step, layer) not in self._table_NE
            ),
            None,
        )
        if missing:
            raise DataError(f"step {missing[0]} has no layer {missing[1]}, other steps have it")
        largest = max(int(table_NE.sum(axis=0).max()) for table_NE in self._table_NE.values())
        source_WLNE = np.zeros(
            (len(steps), len(layers), *self._shape), np.int32 if largest < 2**31 else np.int64
        )
        for row, step in enumerate(steps):
            for place, layer in enumerate(layers):
                table_NE = self._table_NE[step, layer]
                source_WLNE[row, place, : len(table_NE), : table_NE.shape[1]] = table_NE
        load_WLE = source_WLNE.sum(axis=2, dtype=source_WLNE.dtype)
        return Trace(
            np.array(steps, np.int64), load_WLE, source_WLNE=source_WLNE if self._sourced else None
        )


def _decoded(file: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    number = 0
    try:
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_LINE + 1), b""), start=1):
            if len(line) > LARGEST_LINE:
                raise _LineError(number, f"is longer than {LARGEST_LINE >> 20} MiB")
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield number, text
    except UnicodeDecodeError as error:
        raise _LineError(number, f"not UTF-8: {error.reason}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _LineError(number + 1, f"the gzip stream is damaged: {error}") from None


def _json_groups(lines: Iterable[tuple[int, str]], ranks_per_node: int) -> Iterator[Group]:
    for line, text in lines:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _LineError(
                line, f"not JSON: {error}; the name of a CSV table ends in .csv or .csv.gz"
            ) from None
        if type(row) is not dict:
            raise _LineError(line, "not a JSON object")
        step, layer = (_integer(line, key, row.get(key)) for key in ("step", "layer"))
        node = _integer(line, "rank", row["rank"]) // ranks_per_node if "rank" in row else None
        yield line, step, layer, node, _flat(line, row.get("top_indices")), None


def _integer(line: int, key: str, value: Any) -> int:
    """`type` and not isinstance: True is no integer here."""
    if type(value) is not int:
        raise _LineError(line, f"{key} must be an integer, is {json.dumps(value)[:40]}")
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
        raise _LineError(line, "top_indices must be a list of integers, or of lists of integers")
    return indices


def _csv_groups(lines: Iterable[tuple[int, str]], ranks_per_node: int) -> Iterator[Group]:
    """Neighbouring rows of the same step, layer and source at once: NumPy adds them faster than
    one by one.
    """
    rows = _csv_rows(lines, ranks_per_node)
    for (step, layer, node), group in groupby(rows, key=lambda row: row[1:4]):
        block: list[tuple[int, int, int, int | None, int, int]] = []
        for row in chain(group, [None]):
            if row is not None:
                block.append(row)
            if block and (
                row is None or len(block) == BLOCK
            ):  # a whole file of one key must not become one block
                yield (
                    block[-1][0],
                    step,
                    layer,
                    node,
                    [row[4] for row in block],
                    [row[5] for row in block],
                )
                block = []


def _csv_rows(
    lines: Iterable[tuple[int, str]], ranks_per_node: int
) -> Iterator[tuple[int, int, int, int | None, int, int]]:
    numbers: list[int] = []

    def texts() -> Iterator[str]:
        for number, text in lines:
            numbers[:] = [number]
            if "\r" in text.rstrip("\r\n"):
                raise _LineError(
                    number, "has a carriage return within it; a line must end in a line feed"
                )
            yield text

    def read() -> Iterator[list[str]]:
        try:
            yield from csv.reader(texts(), strict=True)
        except csv.Error as error:
            raise _LineError(numbers[0], f"not CSV: {error}") from None

    reader = read()
    header = [name.strip() for name in next(reader, [])]
    source = [name for name in ("rank", "node") if name in header]
    names = ["step", "layer", "expert", "tokens", *source]
    if sorted(header) != sorted(names) or len(source) > 1:
        raise _LineError(
            1,
            (
                "the header must be step,layer,expert,tokens and may have rank or node, is "
                f"{','.join(header)[:80]!r}"
            ),
        )
    places = [header.index(name) for name in names]
    divisor = ranks_per_node if source == ["rank"] else 1
    for cells in reader:
        if len(cells) != len(header):
            raise _LineError(numbers[0], f"has {len(cells)} cells, the header has {len(header)}")
        values = []
        for name, place in zip(names, places):
            cell = cells[place].strip()
            if not (cell.isascii() and cell.isdigit() and len(cell) <= 18):
                raise _LineError(
                    numbers[0],
                    f"{name} must be a whole number from 0 to 10^18, is {cells[place][:40]!r}",
                )
            values.append(int(cell))
        step, layer, expert, tokens = values[:4]
        yield numbers[0], step, layer, values[4] // divisor if source else None, expert, tokens
