"""Encodes text by the word, each distinct one once, with a tokenizer that was trained here.

Its pieces (tokenizer.py) end where ASCII letters end and where digits end, before a space that follows
a visible sign, and after a line feed before a visible sign, whatever comes before or after. So a text
that is cut there, and encoded part by part, has the ids of the whole, and most parts of a corpus have
occurred before. Such a part is a *unit*: a word with what stands before it, or more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pangu_locmoe.data.tokenizer import Tokenizer

_MOST = 400_000
"""Units that are remembered beside those of the texts at hand, some 60 MB."""


class UnitEncoder:
    """`Tokenizer.encode_batch` as arrays, with a memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cuts = _cuts()
        self._ids_of: dict[bytes, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n]. Raises DataError as `encode_batch` does."""
        if not self._tokenizer.is_own:
            return [np.array(ids, np.int32) for ids in self._tokenizer.encode_batch(texts)]
        units_of = [self._units(text) for text in texts]
        self._learn({unit for units in units_of for unit in units})
        ids_of = self._ids_of
        return [
            np.frombuffer(b"".join([ids_of[unit] for unit in units]), np.int32)
            for units in units_of
        ]

    def _units(self, text: str) -> list[bytes]:
        content = text.encode("utf-8", "surrogatepass")  # half characters are refused by `_learn`
        values = np.frombuffer(content, np.uint8)
        cuts = np.flatnonzero(self._cuts[values[:-1], values[1:]]) + 1
        bounds = [0, *cuts.tolist(), len(content)]
        return [content[start:end] for start, end in zip(bounds, bounds[1:])]

    def _learn(self, units: set[bytes]) -> None:
        """The ids of all these, as the bytes of int32."""
        new = [unit for unit in units if unit not in self._ids_of]
        if len(self._ids_of) + len(new) > _MOST:
            self._ids_of = {unit: self._ids_of[unit] for unit in units if unit in self._ids_of}
        texts = [unit.decode("utf-8", "surrogatepass") for unit in new]
        for unit, ids in zip(new, self._tokenizer.encode_batch(texts)):
            self._ids_of[unit] = np.array(ids, np.int32).tobytes()


def _cuts() -> np.ndarray:
    """bool [256, 256]: whether a piece ends between two bytes. Of ASCII alone, of which no two
    Unicode tables disagree.
    """
    letters = np.zeros(256, bool)
    letters[ord("A") : ord("Z") + 1] = letters[ord("a") : ord("z") + 1] = True
    digits = np.zeros(256, bool)
    digits[ord("0") : ord("9") + 1] = True
    visible = np.zeros(256, bool)
    visible[ord("!") : ord("~") + 1] = True
    plain = np.arange(256) < 128
    cuts = np.outer(letters, plain & ~letters) | np.outer(digits, plain & ~digits)
    cuts[visible, ord(" ")] = True
    cuts[ord("\n"), visible] = True
    return cuts
