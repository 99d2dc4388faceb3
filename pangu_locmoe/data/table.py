"""What is known of each document of a corpus, in columns: a row for each, however long it is.

D = documents in the order of reading, copies among them. While they are read, columns grow on the
disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Optional

import numpy as np

from pangu_locmoe.data.alike import BANDS, join_alike


class Column:
    """Grows on the disk; `array` reads it all."""

    def __init__(self, kind: type, folder: Optional[Path]) -> None:
        self._kind: np.dtype[Any] = np.dtype(kind)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 gone with us

    def add(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self._kind).tobytes())

    def array(self) -> np.ndarray:
        self._file.seek(0)
        return np.fromfile(self._file, self._kind)

    def close(self) -> None:
        self._file.close()


class Found:
    """The documents as they are read."""

    def __init__(self, folder: Optional[Path] = None) -> None:
        """`folder`: on a disk with 160 bytes for each document."""
        self.digests = Column(np.uint64, folder)
        """Two for each document."""
        self.sizes = Column(np.int64, folder)
        self.domains = Column(np.uint16, folder)
        self._bands = [Column(np.uint64, folder) for _ in range(BANDS)]

    def add(
        self, domains: Sequence[int], digests: np.ndarray, sizes: np.ndarray, sketches: np.ndarray
    ) -> None:
        """uint64 [n, 2], int64 [n], uint64 [n, bands]."""
        self.digests.add(digests)
        self.sizes.add(sizes)
        self.domains.add(np.array(domains))
        for band, column in zip(sketches.T, self._bands):
            column.add(band)

    def groups(self, first_D: np.ndarray) -> np.ndarray:
        """int [D], the same number for near-copies of each other; `first_D`: bool, those that are
        no exact copies, which alone are looked at.
        """
        labels_D = np.arange(int(first_D.sum()), dtype=np.int64)
        for column in self._bands:
            labels_D = join_alike(labels_D, column.array()[first_D])
            column.close()
        groups_D = np.full(len(first_D), -1, np.int64)
        groups_D[first_D] = labels_D
        return groups_D


@dataclass
class Table:
    """The columns: `used_D` says of which documents anything is used."""

    digests_D2: np.ndarray
    size_D: np.ndarray
    """Bytes of UTF-8."""
    domain_D: np.ndarray
    starts: list[int]
    """Of each file, its first document; and all documents at the end."""
    used_D: np.ndarray
    validation_D: np.ndarray = field(init=False)
    """bool, the side."""
    keep_D: np.ndarray = field(init=False)
    """Bytes of it that are used; less than its size where a limit is reached within it."""
    group_D: np.ndarray = field(init=False)

    @property
    def order_D(self) -> np.ndarray:
        """A hash, for taking a sample."""
        return self.digests_D2[:, 1]

    def first_by_hash(self, among_D: np.ndarray, last: bool = False) -> int:
        """The document with the smallest hash, or the largest."""
        index = np.flatnonzero(among_D)
        pick = np.max if last else np.min
        for part in (0, 1):
            values = self.digests_D2[index, part]
            index = index[values == pick(values)]
        return int(index[0])


def first_of_copies(digests_D2: np.ndarray) -> np.ndarray:
    """bool [D], the first document of each content."""
    order = np.lexsort((digests_D2[:, 1], digests_D2[:, 0]))  # stable
    first_D = np.ones(len(order), bool)
    same = np.ones(max(len(order) - 1, 0), bool)
    for part in (0, 1):
        sorted_D = digests_D2[:, part][order]
        same &= sorted_D[1:] == sorted_D[:-1]
    first_D[order[1:][same]] = False
    return first_D


def within(
    table: Table, among_D: np.ndarray, domains: int, max_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Take documents of each domain by their hash until `max_bytes`; the last one is cut there.

    Returns bool [D], those that are taken, and int64 [D], bytes of each that are kept.
    """
    taken_D = np.zeros(len(among_D), bool)
    keep_D = table.keep_D.copy()
    for domain in range(domains):
        index = np.flatnonzero(among_D & (table.domain_D == domain))
        index = index[np.argsort(table.order_D[index], kind="stable")]
        sizes = table.keep_D[index]
        room = max_bytes - (np.cumsum(sizes) - sizes)
        index, sizes, room = index[room > 0], sizes[room > 0], room[room > 0]
        taken_D[index] = True
        keep_D[index] = np.minimum(sizes, room)
    return taken_D, keep_D
