"""Documents -> sequences of one length, and where each document begins in them.

A domain's stream is `<eod> document <eod> document ...`: the token that ends one document begins
the next. Sequences are windows of S+1 tokens with stride S, so that the last target of one is the
first input of the next and every token but the first is a target exactly once.

B = batch, S = sequence. All arrays are int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import numpy as np


class Packer:
    """Cuts one domain's documents into sequences as they come; holds less than one sequence."""

    def __init__(self, seq_length: int, end_of_document: int) -> None:
        self.seq_length = seq_length
        self.end_of_document = end_of_document
        self.sequences = 0
        self.tokens = 0
        """Tokens of the stream so far, `<eod>` included."""
        self._rest = np.empty(0, np.int32)

    def add(self, documents: Sequence[Union[Sequence[int], np.ndarray]]) -> np.ndarray:
        """Append documents (token ids without `<eod>`); return the int32 [n, S+1] sequences they
        complete, n >= 0.
        """
        parts = [self._rest]
        for document in documents:
            parts += [np.array([self.end_of_document], np.int32), np.asarray(document, np.int32)]
        stream = np.concatenate(parts)
        self.tokens += len(stream) - len(self._rest)
        count = max(len(stream) - 1, 0) // self.seq_length
        self.sequences += count
        self._rest = stream[count * self.seq_length :].copy()
        starts = np.arange(count)[:, None] * self.seq_length
        return stream[starts + np.arange(self.seq_length + 1)]

    @property
    def unused_tokens(self) -> int:
        """Tokens after the last target so far: what is dropped if nothing follows."""
        return len(self._rest) - (1 if self.sequences else 0)

    def pad(self) -> np.ndarray:
        """Fill the tail with `<eod>` into the last sequence, int32 [1, S+1]; [0, S+1] if there
        is no tail.
        """
        if self.unused_tokens == 0:
            return np.empty((0, self.seq_length + 1), np.int32)
        sequence = np.full((1, self.seq_length + 1), self.end_of_document, np.int32)
        sequence[0, : len(self._rest)] = self._rest
        self.sequences += 1
        self._rest = self._rest[-1:]
        return sequence


def positions_and_segments(
    tokens_BS: np.ndarray, end_of_document: int, reset: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Position of each input token in its document and number of its document in the sequence, both
    int32 [B, S].

    A sequence starts at position 0 of segment 0. With `reset`, each `<eod>` after that begins the
    next segment at position 0; without it the whole sequence is one segment.
    """
    batch, length = tokens_BS.shape
    index_S = np.arange(length, dtype=np.int32)
    if not reset:
        return np.tile(index_S, (batch, 1)), np.zeros((batch, length), np.int32)
    begins_BS = tokens_BS == end_of_document
    begins_BS[:, 0] = False
    segments_BS = np.cumsum(begins_BS, axis=1, dtype=np.int32)
    first_BS = np.maximum.accumulate(np.where(begins_BS, index_S, 0), axis=1)
    return (index_S - first_BS).astype(np.int32), segments_BS
