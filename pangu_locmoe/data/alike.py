"""Which documents are near-copies of each other: a sketch of each, and groups of those whose
sketches agree.

A sketch is a MinHash of a document's shingles (its strings of 24 bytes, capitals and white space
aside), in bands of rows. Documents that agree in a band belong together, and so do those that
belong together with a third one. The groups depend on the documents and not on their order.

D = documents, B = bands.
"""

from __future__ import annotations

import string
from typing import Any

import numpy as np

from pangu_locmoe.data.hashing import window_hashes

_SHINGLE = 24
"""Bytes: about four English words or eight Chinese characters; a shorter document is one
shingle.
"""
_SHINGLES = 256
"""Those with the smallest hashes stand for a document, which bounds the time a long one takes."""
_ROWS = 4
_BANDS = 16
"""Two documents share a band more often than not from a Jaccard similarity of about 1/2 on."""
_BLOCK = 1_000_000
"""Bytes hashed at a time, which bounds the memory a long document takes."""
_LOWER = bytes.maketrans(string.ascii_uppercase.encode(), string.ascii_lowercase.encode())


class Sketcher:
    """Makes sketches. It is deterministic on every machine."""

    def __init__(self) -> None:
        from datasketch import MinHash

        # The scheme is named because sketches decide the split, whatever later versions take by
        # default.
        self._minhash: Any = MinHash(
            num_perm=_ROWS * _BANDS, seed=1, hashfunc=int, scheme="affine32"
        )

    def sketch(self, content: bytes) -> np.ndarray:
        """uint64 [B], a hash of each band of a text in UTF-8."""
        shingles = _smallest_shingles(content.translate(_LOWER, b" \t\r\n"))
        self._minhash.clear()
        self._minhash.update_batch((shingles & np.uint64(2**32 - 1)).tolist())
        return window_hashes(self._minhash.hashvalues, _ROWS)[::_ROWS]


def _smallest_shingles(content: bytes) -> np.ndarray:
    values = np.frombuffer(content, np.uint8)
    size = min(_SHINGLE, max(len(values), 1))
    count = max(len(values) - size + 1, 1)
    # Some eight times as many as are needed, because a text repeats itself.
    bound = np.uint64(min(8 * _SHINGLES / count, 1) * (2.0**64 - 2048))
    blocks = (
        window_hashes(values[i : i + _BLOCK + size - 1], size) for i in range(0, count, _BLOCK)
    )
    return np.unique(np.concatenate([hashes[hashes <= bound] for hashes in blocks]))[:_SHINGLES]


def groups_of_alike(sketches_DB: np.ndarray) -> np.ndarray:
    """int [D], the same number for documents that belong together."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    documents, bands = sketches_DB.shape
    salted_DB = sketches_DB * np.uint64(2 * bands + 1) + np.arange(bands, dtype=np.uint64)
    distinct, band_of = np.unique(salted_DB.reshape(-1), return_inverse=True)
    # Documents and bands are the nodes of one graph, and a document is joined to its bands.
    edges = (np.repeat(np.arange(documents), bands), documents + band_of)
    graph = coo_matrix(
        (np.ones(documents * bands, bool), edges), shape=(documents + len(distinct),) * 2
    )
    return connected_components(graph, directed=False)[1][:documents]
