"""What makes two preparations the same data, wherever they lie: the text as it is used, the
tokenizer, and how both are cut.

An identity is a dict for JSON: `tokenizer` (digest), `seq_length`, and `text`, a digest for each
domain and split. Paths, times and the order of unused files are not in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Identity = Mapping[str, Any]


class TextDigest:
    """The digest of documents in the order they are used, each with the pieces it is cut into."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, pieces: Sequence[bytes]) -> None:
        """Take one document."""
        # Lengths keep "ab", "c" apart from "a", "bc".
        for number in (len(pieces), *map(len, pieces)):
            self._hash.update(number.to_bytes(8, "big"))
        for piece in pieces:
            self._hash.update(piece)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def tokenizer_digest(file: Path) -> str:
    """The digest of a tokenizer.json as `Tokenizer.save` writes it. Raises OSError."""
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def differences(before: Identity, now: Identity) -> list[str]:
    """What is not the same, each in a few words; nothing where it is the same data."""
    found = []
    if before["tokenizer"] != now["tokenizer"]:
        found.append("the tokenizer")
    if before["seq_length"] != now["seq_length"]:
        found.append(f"model.seq_length ({before['seq_length']} and {now['seq_length']})")
    if list(before["text"]) != list(now["text"]):
        found.append(f"the domains ({', '.join(before['text'])} and {', '.join(now['text'])})")
    for domain, splits in now["text"].items():
        own = before["text"].get(domain, splits)
        names = {"train": "training", "validation": "validation"}
        found += [
            f"the {name} text of {domain}"
            for split, name in names.items()
            if own[split] != splits[split]
        ]
    return found


def part_of(identity: Identity, domain: str) -> dict[str, Any]:
    """The identity of one domain's data alone."""
    return {**identity, "text": {domain: identity["text"][domain]}}
