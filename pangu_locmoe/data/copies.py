"""How much of the held-out text stands in the training text word for word, in runs of 32 tokens and
more.

Splitting by document, and near-copies together, leaves passages that documents share: licences,
tables, quotations. They make a validation loss look better than it is, so their part is counted
and reported.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from pangu_locmoe.data.hashing import window_hashes

RUN = 32
"""Tokens in the shortest run that counts."""
_SEARCHED_BYTES = 32_000_000
"""Held-out text that is looked for, over all domains; bounds the memory (about 250 MB)."""


class CopiedRuns:
    """Give it the held-out documents (`hold`), then the training text (`search`), then ask for
    `counts`.
    """

    def __init__(self, held_out_bytes: Sequence[int]) -> None:
        """`held_out_bytes`: size of each domain's held-out text; of a large one a sample of
        documents is looked for.
        """
        room = _SEARCHED_BYTES / max(len(held_out_bytes), 1)
        self._shares = [min(room / max(size, 1), 1.0) for size in held_out_bytes]
        self._windows: list[list[np.ndarray]] = [[] for _ in held_out_bytes]
        self._is_indexed = False

    def hold(self, domain: int, contents: Sequence[bytes], ids: Sequence[np.ndarray]) -> None:
        """Take held-out pieces of text and their tokens, int32 [n] each."""
        for content, tokens in zip(contents, ids):
            if zlib.crc32(content) < self._shares[domain] * 2**32:
                # The last 31 tokens begin no window; 0 keeps their positions.
                padded = np.zeros(len(tokens), np.uint64)
                padded[: max(len(tokens) - RUN + 1, 0)] = window_hashes(tokens, RUN)
                self._windows[domain].append(padded)

    def search(self, ids: Sequence[np.ndarray], end_of_document: int) -> None:
        """Look for the held-out windows in training pieces."""
        if not self._is_indexed:
            self._index()
        # No held-out window has an end of a document in it.
        hashes = window_hashes(
            np.concatenate([part for tokens in ids for part in (tokens, [end_of_document])]), RUN
        )
        hashes = hashes[self._maybe[(hashes & self._mask).astype(np.int64)]]
        positions = np.searchsorted(self._sorted, hashes)
        self._found[positions[self._sorted[positions] == hashes]] = True

    def _index(self) -> None:
        self._is_indexed = True
        windows = [part for parts in self._windows for part in parts]
        # The largest number at the end, so that every search ends at a position.
        self._sorted = np.unique(np.concatenate([*windows, np.array([2**64 - 1], np.uint64)]))
        self._found = np.zeros(len(self._sorted), bool)
        # Most windows of the training text are none of these; a table of bits says so at once.
        bits = min(int(np.ceil(np.log2(16 * len(self._sorted)))), 27)
        self._mask = np.uint64(2**bits - 1)
        self._maybe = np.zeros(2**bits, bool)
        self._maybe[(self._sorted & self._mask).astype(np.int64)] = True

    def counts(self) -> list[tuple[int, int]]:
        """(tokens looked for, tokens of them in a copied run) of each domain."""
        if not self._is_indexed:
            self._index()
        result = []
        for parts in self._windows:
            copied = sum(int(self._covered(part).sum()) for part in parts)
            result.append((sum(map(len, parts)), copied))
        return result

    def _covered(self, windows: np.ndarray) -> np.ndarray:
        """bool [n], tokens in a window that was found."""
        starts = self._found[np.searchsorted(self._sorted, windows)]
        starts[max(len(windows) - RUN + 1, 0) :] = False
        changes = np.zeros(len(windows) + RUN, np.int64)
        changes[: len(windows)] += starts
        changes[RUN:] -= starts
        return np.cumsum(changes)[: len(windows)] > 0
