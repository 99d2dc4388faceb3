"""Encodes text by the word, each distinct one once, with a tokenizer that was trained here.

Its pieces (tokenizer.py) never go on from a visible sign to a space, nor from a line feed to a visible
sign, whatever comes before or after. So a text that is cut there, and encoded part by part, has the
ids of the whole, and most parts of a corpus have occurred before. What such a text is cut into is a
*unit*: a word with the space before it, or more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pangu_locmoe.data.tokenizer import Tokenizer

# Visible ASCII alone, of which no two Unicode tables disagree.
_CUTS = re.compile(r"(?<=[!-~])(?= )|(?<=\n)(?=[!-~])")
_MOST = 200_000
"""Units that are remembered beside those of the texts at hand, some 30 MB."""


class UnitEncoder:
    """`Tokenizer.encode_batch` as arrays, with a memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cuts = tokenizer.is_own
        self._ids_of: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n]. Raises DataError as `encode_batch` does."""
        if not self._cuts:
            return [np.array(ids, np.int32) for ids in self._tokenizer.encode_batch(texts)]
        units_of = [_CUTS.split(text) for text in texts]
        self._learn({unit for units in units_of for unit in units})
        ids_of = self._ids_of
        return [
            np.frombuffer(b"".join([ids_of[unit] for unit in units]), np.int32)
            for units in units_of
        ]

    def _learn(self, units: set[str]) -> None:
        """The ids of all these, as the bytes of int32."""
        new = [unit for unit in units if unit not in self._ids_of]
        if len(self._ids_of) + len(new) > _MOST:
            self._ids_of = {unit: self._ids_of[unit] for unit in units if unit in self._ids_of}
        for unit, ids in zip(new, self._tokenizer.encode_batch(new)):
            self._ids_of[unit] = np.array(ids, np.int32).tobytes()
