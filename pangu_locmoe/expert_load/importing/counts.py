"""Counts of every step and layer, added up group by group as a file's lines come.

Letters: W rows (steps), L layers, N nodes, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.importing.limits import (
    LARGEST_INDEX,
    LARGEST_TABLE,
    LARGEST_TRACE,
    LineError,
    Options,
    naming,
)
from pangu_locmoe.expert_load.trace import LARGEST, Trace

# What text becomes, in groups of equal step, layer and source: the last line's number, step, layer,
# rank or node, experts, tokens (None: one each).
Group = tuple[int, int, int, Optional[int], "list[int]", "list[int] | None"]


def read_groups(
    files: Sequence[Path], options: Options, groups_of: Callable[[Path], Iterable[Group]]
) -> Trace:
    """The groups of all files, added up. Raises DataError that names the file and the line."""
    counts = Counts(options.num_experts)
    for path in files:
        with naming(path):
            for group in groups_of(path):
                counts.add(*group)
    with naming(files[0]):
        return counts.trace()


class Counts:
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
                raise LineError(line, f"{name} {value}: must be 0 to {largest}")
        if self._sourced not in (None, node is not None):
            raise LineError(
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
            raise LineError(line, f"expert {wrong[0]}: must be 0 to {top}")
        place = node or 0
        self._shape = (
            max(self._shape[0], place + 1),
            max(self._shape[1], max(experts, default=0) + 1),
        )
        for size, largest in ((1, LARGEST_TABLE), (len(self._table_NE), LARGEST_TRACE)):
            if size * self._shape[0] * self._shape[1] > largest:
                raise LineError(
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
            raise LineError(
                line, f"step {step}, layer {layer}: an expert has more than {LARGEST} tokens"
            )
        np.add.at(table_NE[place], experts, 1 if tokens is None else tokens)
        if table_NE[place].max() > LARGEST:
            raise LineError(
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
