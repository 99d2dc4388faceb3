"""Megatron's indexed data sets: token ids in NAME.bin, and where they are in NAME.idx.

An index is, little-endian: `MMIDIDX\\0\\0`, version 1 (uint64), a code for the ids' type (uint8), the
numbers of sequences and of document bounds (uint64 each), the sequences' lengths (int32) and places
in bytes (int64), and the bounds: document d has the sequences from bound d to bound d + 1 (int64).
What may follow, modes of sequences, is not read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pangu_locmoe.data.finding import Count, shown
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The types that ids can have; 6 and 7 are floating-point."""


def is_index(path: Path) -> bool:
    """Whether a file is such an index."""
    try:
        with path.open("rb") as file:
            return path.suffix.lower() == ".idx" and file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def with_indices(files: Iterable[Path]) -> list[Path]:
    """The files with an index in the place of its .bin, each once."""
    found: dict[Path, None] = {}
    for file in files:
        index = file.with_suffix(".idx")
        found[index if file.suffix == ".bin" and is_index(index) else file] = None
    return list(found)


def ids_file(index: Path) -> Path:
    """NAME.bin of NAME.idx."""
    return index.with_suffix(".bin")


def read_indexed(
    index: Path, tokenizer: Tokenizer, max_bytes: int, count: Count
) -> Iterator[np.ndarray]:
    """Yield the ids of each document, int32 [n], without `<eod>`, which ends one.

    Problems go to `count`: an index that does not fit its .bin, documents without text, and those
    of more than `max_bytes` bytes. Raises DataError for ids that the tokenizer does not have.
    """
    try:
        sequences = _Sequences(index)
    except (OSError, ValueError, struct.error):
        return count("unreadable", shown(index))
    for number, ids in enumerate(sequences.documents()):
        location = f"{shown(index)}:{number + 1}"
        _check_vocabulary(ids, tokenizer, location)
        for part in _between(ids.astype(np.int32), tokenizer.end_of_document):
            size = int(tokenizer.token_bytes[part].sum())
            if size > max_bytes:
                count("huge", location)
            elif not tokenizer.bytes_of_all(part).strip():
                count("empty", location)
            else:
                yield part


class _Sequences:
    """An index, checked against the file it is of, whose ids stay on the disk."""

    def __init__(self, index: Path) -> None:
        content = np.memmap(index, np.uint8, "r")
        magic, version, code, sequences, bounds = _HEADER.unpack(content[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != 1 or code not in _TYPES:
            raise ValueError("not an index of token ids")
        at = _HEADER.size
        self._lengths = np.frombuffer(content, "<i4", sequences, at)
        self._places = np.frombuffer(content, "<i8", sequences, at + 4 * sequences)
        self._bounds = np.frombuffer(content, "<i8", bounds, at + 12 * sequences)
        self._type = np.dtype(_TYPES[code])
        size = ids_file(index).stat().st_size
        self._ids = np.memmap(ids_file(index), np.uint8, "r") if size else np.empty(0, np.uint8)
        self._check(size)

    def _check(self, size: int) -> None:
        ends = self._places + self._lengths.astype(np.int64) * self._type.itemsize
        within = (self._lengths >= 0).all() and (self._places >= 0).all() and (ends <= size).all()
        bounds = self._bounds
        ordered = len(bounds) == 0 or (
            bounds[0] == 0 and bounds[-1] <= len(ends) and (np.diff(bounds) >= 0).all()
        )
        if not (within and ordered):
            raise ValueError("does not fit its .bin")

    def documents(self) -> Iterator[np.ndarray]:
        for first, end in zip(self._bounds[:-1], self._bounds[1:]):
            parts = [self._sequence(number) for number in range(first, end)]
            yield np.concatenate(parts) if parts else np.empty(0, self._type)

    def _sequence(self, number: int) -> np.ndarray:
        place = int(self._places[number])
        size = int(self._lengths[number]) * self._type.itemsize
        return np.frombuffer(self._ids[place : place + size].tobytes(), self._type)


def _check_vocabulary(ids: np.ndarray, tokenizer: Tokenizer, location: str) -> None:
    """Every id stands for text, or ends a document."""
    known = (ids >= 0) & (ids < tokenizer.vocab_size)
    inside = np.where(known, ids, tokenizer.end_of_document).astype(np.int64)
    known &= (tokenizer.token_bytes[inside] > 0) | (inside == tokenizer.end_of_document)
    if not known.all():
        raise DataError(
            f"data.sources: {location}: token id {ids[~known][0]} is none of data.tokenizer, which "
            f"has {tokenizer.vocab_size} tokens; give the tokenizer it was made with"
        )


def _between(ids: np.ndarray, end_of_document: int) -> list[np.ndarray]:
    """The parts between ends of documents; one at the very end ends the last part."""
    places = np.flatnonzero(ids == end_of_document)
    if len(places) and places[-1] == len(ids) - 1:
        ids, places = ids[:-1], places[:-1]
    return [part[part != end_of_document] for part in np.split(ids, places)]
