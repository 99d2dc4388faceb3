"""Sequences in and out of MindRecord files; reading in any order without holding the corpus in
memory.

Schema: `tokens` int32 [S+1], `domain` int32. S = sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pangu_locmoe.errors import DataError

SCHEMA = {"tokens": {"type": "int32", "shape": [-1]}, "domain": {"type": "int32"}}
_ROWS_PER_WRITE = 1000


class RecordWriter:
    """Writes sequences of one domain into `<stem>-00000.mindrecord`, `<stem>-00001.mindrecord`,
    ...
    """

    def __init__(self, folder: Path, stem: str, domain: int, rows_per_file: int = 200_000) -> None:
        self.files: list[Path] = []
        self.rows = 0
        self._folder = folder
        self._stem = stem
        self._domain = domain
        self._rows_per_file = rows_per_file
        self._waiting: list[np.ndarray] = []
        self._in_file = 0
        self._writer: Any = None

    def write(self, sequences: np.ndarray) -> None:
        """Append int32 [n, S+1]. Raises DataError if the disk does not take it."""
        self._waiting += list(sequences)
        self.rows += len(sequences)
        while len(self._waiting) >= _ROWS_PER_WRITE:
            self._flush()

    def close(self) -> list[Path]:
        """Finish the last file; returns all of them in order. Without rows there are none."""
        while self._waiting:
            self._flush()
        self._finish_file()
        return self.files

    def _flush(self) -> None:
        from mindspore.mindrecord import FileWriter

        if self._writer is None:
            path = self._folder / f"{self._stem}-{len(self.files):05d}.mindrecord"
            self.files.append(path)
            self._writer = FileWriter(str(path), shard_num=1)
            self._writer.add_schema(SCHEMA, "sequences of tokens")
        rows = self._waiting[: min(_ROWS_PER_WRITE, self._rows_per_file - self._in_file)]
        del self._waiting[: len(rows)]
        with _disk_errors(self._folder):
            self._writer.write_raw_data([{"tokens": row, "domain": self._domain} for row in rows])
        self._in_file += len(rows)
        if self._in_file >= self._rows_per_file:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._writer is not None:
            with _disk_errors(self._folder):
                self._writer.commit()
                for path in self._folder.glob(self.files[-1].name + "*"):
                    path.chmod(0o644)  # MindRecord keeps its files from everybody else
        self._writer = None
        self._in_file = 0


def read_sequences(files: Sequence[Path], indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the int32 [S+1] sequences with these numbers, in this order; numbers run through
    `files` in order.

    Raises DataError if a file is missing, damaged or shorter than the numbers ask for.
    """
    import mindspore.dataset as ds

    if len(indices) == 0:
        return
    # MindDataset refuses more indices than rows, so what occurs twice is read once.
    unique, inverse = np.unique(np.asarray(indices, np.int64), return_inverse=True)
    if len(unique) < len(indices):
        distinct = list(read_sequences(files, unique.tolist()))
        yield from (distinct[i] for i in inverse)
        return
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None or not files:
        raise DataError(
            f"{missing or 'no MindRecord files'}: missing; delete its folder and prepare "
            "the data again"
        )
    names = [str(path) for path in files]
    try:
        # MindRecord answers a number beyond the end with some other row, without a word.
        rows = ds.MindDataset(names, columns_list=["tokens"]).get_dataset_size()
        if unique[0] < 0 or unique[-1] >= rows:
            raise ValueError(f"sequences {unique[0]} to {unique[-1]} asked for, {rows} are there")
        sampler = ds.SubsetSampler([int(i) for i in indices])
        # One worker: rows come in the sampler's order and a small read starts no threads it does
        # not need.
        dataset = ds.MindDataset(
            names, columns_list=["tokens"], sampler=sampler, num_parallel_workers=1
        )
        for (tokens,) in dataset.create_tuple_iterator(num_epochs=1, output_numpy=True):
            yield tokens
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{files[0].parent}: damaged MindRecord files ({_first_line(error)}); delete "
            "the folder and prepare again"
        ) from None


class _disk_errors:
    """Turns MindRecord's errors while writing into one line that names the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        logging.getLogger("MINDRECORD").setLevel(logging.ERROR)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, (RuntimeError, OSError)):
            raise DataError(
                f"{self._folder}: cannot write MindRecord files ({_first_line(error)})"
            ) from None


def _first_line(error: BaseException) -> str:
    lines = (
        [line.strip() for line in str(error).splitlines() if "ERROR]" in line]
        or str(error).splitlines()
        or [type(error).__name__]
    )
    return lines[0][:200]
