"""One side of a domain on its way from text to sequences: tokenized by workers, packed and counted
here, in the order of the text.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pangu_locmoe.config import Config
from pangu_locmoe.data.bigram import CONTEXTS, count_bigrams
from pangu_locmoe.data.copies import CopiedRuns
from pangu_locmoe.data.corpus import Piece
from pangu_locmoe.data.documents import content_of
from pangu_locmoe.data.identity import TextDigest, tokenizer_digest
from pangu_locmoe.data.packing import Packer
from pangu_locmoe.data.records import RecordWriter
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.data.units import UnitEncoder
from pangu_locmoe.data.workers import Arrays, Queue

_CHUNK_BYTES = 1_000_000
"""Text tokenized at a time: enough to be worth handing over, little enough for the memory."""


def tokenize(tokenizer_file: Path, digest: str, pieces: list[Piece]) -> Arrays:
    """Ids of all pieces, one after the other, int32 [tokens], how many each has, int64 [pieces],
    and their byte pairs (bigram.py).

    `digest`: of the tokenizer, by which a result that was kept is found again.
    """
    tokenizer, encoder = _loaded(tokenizer_file, digest)
    encoded = iter(encoder.encode([piece for piece in pieces if isinstance(piece, str)]))
    ids = [next(encoded) if isinstance(piece, str) else piece for piece in pieces]
    bigrams = count_bigrams([content_of(piece, tokenizer) for piece in pieces])
    return np.concatenate(ids), np.array([len(one) for one in ids], np.int64), bigrams


@functools.lru_cache(maxsize=1)
def _loaded(tokenizer_file: Path, digest: str) -> tuple[Tokenizer, UnitEncoder]:
    tokenizer = Tokenizer.load(tokenizer_file)
    return tokenizer, UnitEncoder(tokenizer)


class Side:
    """One split of one domain."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        folder: Path,
        domain: int,
        split: str,
        runs: CopiedRuns,
        queue: Queue,
    ) -> None:
        self.domain = domain
        self.split = split
        self.documents = self.bytes = 0
        self.digest = TextDigest()
        self.bigrams = np.zeros((CONTEXTS, 256), np.int64)
        self.token_counts = np.zeros(config.model.vocab_size, np.int64)
        self.packer = Packer(config.model.seq_length, tokenizer.end_of_document)
        # Numbers, not names, because a domain may be called anything.
        self.writer = RecordWriter(folder, f"{split}-{domain}", domain)
        self.unused_tokens = 0
        self._starts: list[np.ndarray] = []
        self._tokenizer = tokenizer
        # A given one under its own name, which errors have.
        self._tokenizer_file = Path(config.data.tokenizer or folder / "tokenizer.json")
        self._tokenizer_digest = tokenizer_digest(folder / "tokenizer.json")
        self._runs = runs
        self._queue = queue
        self._waiting = Chunk(self)

    @property
    def document_starts(self) -> np.ndarray:
        """Place in the stream of each validation document's `<eod>`, int64 [documents]."""
        return np.concatenate([np.empty(0, np.int64), *self._starts])

    def add(self, pieces: list[Piece]) -> int:
        """Take one document; returns its bytes."""
        contents = [content_of(piece, self._tokenizer) for piece in pieces]
        size = sum(map(len, contents))
        self.documents += 1
        self.bytes += size
        self.digest.add(contents)
        ids = [piece.tobytes() for piece in pieces if isinstance(piece, np.ndarray)]
        if ids:  # the same bytes may be other tokens
            self.digest.add(ids)
        chunk = self._waiting
        chunk.firsts.append(len(chunk.pieces))
        chunk.pieces += pieces
        chunk.size += size
        if self.split == "validation":
            chunk.contents += contents
        if chunk.size >= _CHUNK_BYTES:
            self.hand_over()
        return size

    def hand_over(self) -> None:
        """Give what waits to the workers."""
        chunk = self._waiting
        self._waiting = Chunk(self)
        if chunk.pieces:
            self._queue.add(chunk, self._tokenizer_file, self._tokenizer_digest, chunk.pieces)

    def take(
        self, chunk: Chunk, tokens: np.ndarray, lengths: np.ndarray, bigrams: np.ndarray
    ) -> None:
        """A chunk of this side that was tokenized."""
        ids = np.split(tokens, np.cumsum(lengths)[:-1])
        self.token_counts += np.bincount(tokens, minlength=len(self.token_counts))
        self.token_counts[self._tokenizer.end_of_document] += len(ids)
        self.bigrams += bigrams
        if self.split == "validation":
            starts = self.packer.tokens + np.cumsum([0, *(lengths + 1)])
            self._starts.append(starts[chunk.firsts])
            self._runs.hold(self.domain, chunk.contents, ids)
        else:
            self._runs.search(ids, self._tokenizer.end_of_document)
        self.writer.write(self.packer.add(ids))

    def close(self) -> None:
        if self.split == "validation" and self.packer.sequences == 0:
            self.writer.write(self.packer.pad())
        self.unused_tokens = self.packer.unused_tokens
        self.writer.close()


@dataclass
class Chunk:
    """Documents of a side that are tokenized together."""

    side: Side
    pieces: list[Piece] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    """Of each document, its first piece."""
    contents: list[bytes] = field(default_factory=list)
    """Of validation pieces."""
    size: int = 0


def take(chunk: Chunk, tokens: np.ndarray, lengths: np.ndarray, bigrams: np.ndarray) -> None:
    """What `tokenize` made of a chunk goes to its side."""
    chunk.side.take(chunk, tokens, lengths, bigrams)
