"""The simplest language model as a yardstick: the next byte given the one before.

Context 256 stands for the start of a document; every context's 256 counts start at one (add-one
smoothing).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONTEXTS = 257
_START = 256


def count_bigrams(texts: Sequence[bytes]) -> np.ndarray:
    """Pairs of context and byte in documents: int64 [257, 256]."""
    following = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64)
    before = np.concatenate([[_START], following])[: len(following)]
    starts = np.cumsum([0, *map(len, texts)])[:-1]
    before[starts[starts < len(before)]] = _START
    return np.bincount(before * 256 + following, minlength=CONTEXTS * 256).reshape(CONTEXTS, 256)


def bits_per_byte(training: np.ndarray, text: np.ndarray) -> float:
    """Mean -log2 p(byte | byte before) in a text, with p fitted on a training text; both given as
    counts [257, 256].

    NaN if the text is empty.
    """
    total = text.sum()
    if total == 0:
        return float("nan")
    smoothed = training + 1.0
    bits = -np.log2(smoothed / smoothed.sum(axis=1, keepdims=True))
    return float((bits * text).sum() / total)
