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
BANDS = 16
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
            num_perm=_ROWS * BANDS, seed=1, hashfunc=int, scheme="affine32"
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
    labels_D = np.arange(len(sketches_DB), dtype=np.int64)
    for band_D in sketches_DB.T:
        labels_D = join_alike(labels_D, band_D)
    return labels_D


def join_alike(labels_D: np.ndarray, band_D: np.ndarray) -> np.ndarray:
    """The labels with those of documents joined that agree in a band, int [D]."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    order = np.argsort(band_D, kind="stable")
    same = np.flatnonzero(band_D[order[1:]] == band_D[order[:-1]])
    edges = (labels_D[order[same]], labels_D[order[same + 1]])
    if not (edges[0] != edges[1]).any():
        return labels_D
    size = int(labels_D.max()) + 1
    graph = coo_matrix((np.ones(len(same), bool), edges), shape=(size, size))
    return connected_components(graph, directed=False)[1][labels_D].astype(np.int64)
