"""Text <-> token ids: a byte-level BPE that loses nothing and knows no unknown token.

Every string of bytes has an encoding because all 256 bytes are tokens. Runs of Han characters are a
pre-token of their own, so that no token mixes Chinese with markup or Latin letters. One JSON file
in the format of Hugging Face `tokenizers` holds everything.

A tokenizer.json from elsewhere may cut, pad, rewrite or drop text. What can be switched off without
losing any is (`switched_off`), and every encoding is held against its text, so that the rest is
refused instead of trained on.

V = tokens in this tokenizer's vocabulary (which may be fewer than model.vocab_size).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from pangu_locmoe.errors import DataError
from pangu_locmoe.files import write_atomic

END_OF_DOCUMENT = "<eod>"

# Han runs | contractions | a word with at most one sign before it | up to three digits | signs |
# line ends | spaces.
# What none of them matches stays a piece of its own, so nothing can be lost here. No run is
# endless: learning merges
# takes time in the square of a piece's length.
_PIECES = (
    r"\p{Han}{1,64}|'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})\p{L}){1,64}|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]{1,64}[\r\n]{0,64}|\s{0,64}[\r\n]{1,64}|\s{1,64}(?!\S)|\s{1,64}"
)

# Capitals, accents whole and apart, compatibility forms, spaces of all kinds, controls, and the
# signs that tokenizers
# use for their own ends: what a setting that loses text is likely to touch.
_PROBE = (
    "The quick BROWN fox can't jump, 1234567 times!  \t\r\n\n  Caf\u00e9 Cafe\u0301 "
    "\ufb01ne \u2460 \u212b \uff21\uff11 \u3000\u00a0\u200b\u200d\ufeff"
    "``x'' \u2018y\u2019 ... -- \u2014 _a_ \u2581b\u0120c ##d e@@ f</w> <unk> <s></s> "
    "[UNK] [CLS] \u4e2d\u6587\u3002\u00df\u0130\u0131 \u0e01\u0e33 \u0301\u0308"
    " \U0001f600\U0001f468\u200d\U0001f469 \u0391\u03c2 \ufffd \x00\x01\x7f\x85\u2028 "
    "a.b,c;d 3.14 $x^2 `~|\\ end \n "
)


class Tokenizer:
    """Byte-level BPE with one special token, `<eod>`, which no text can spell."""

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "the tokenizer") -> None:
        """Wrap a Hugging Face tokenizer.

        Raises DataError if it is not byte-level BPE, has no `<eod>` or loses text.
        """
        values = json.loads(backend.to_str())
        self._name = name
        self.switched_off = _switch_off(values)
        """Settings of the file that are not in force because they cut, fill or vary texts."""
        if self.switched_off:
            backend = tokenizers.Tokenizer.from_str(json.dumps(values))
        self.is_own = _is_own(values)
        """Whether texts are cut into the pieces that `train` cuts them into, and nothing else is
        done to them.
        """
        identifier = backend.token_to_id(END_OF_DOCUMENT)
        if identifier is None:
            raise DataError(
                f"{name}: no {END_OF_DOCUMENT} token; train one by leaving data.tokenizer out"
            )
        # A text that contains the five characters "<eod>" is only a text.
        backend.encode_special_tokens = True
        self._backend = backend
        self.end_of_document: int = identifier
        added = {token["id"]: token["content"] for token in values["added_tokens"]}
        try:
            self._bytes = _bytes_of_tokens(
                backend.get_vocab(with_added_tokens=True), added, identifier
            )
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        self.vocab_size: int = len(self._bytes)
        self.token_bytes = np.array([len(piece) for piece in self._bytes], np.int32)
        """int32 [V], the bytes of text a token stands for; 0 for `<eod>`."""
        if identifier in self._encode([f"a{END_OF_DOCUMENT}b"])[0]:
            raise DataError(
                f"{name}: the characters {END_OF_DOCUMENT} in a text become the end of the document"
            )
        self.encode(_PROBE + "".join(f" {content}  {content}\n" for content in added.values()))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges until there are `vocab_size` tokens or nothing is left to merge.

        `<eod>` is id 0.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = _own_pieces()
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """Read a tokenizer.json.

        Raises DataError if it cannot be read or used, or has more than `vocab_size` tokens.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"tokenizer {path}: cannot be read: "
                f"{getattr(error, 'strerror', None) or 'not text'}"
            ) from None
        try:
            _check_model(json.loads(text)["model"])
            backend = tokenizers.Tokenizer.from_str(text)
        except DataError as error:
            raise DataError(f"tokenizer {path}: {error}") from None
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"tokenizer {path}: not a tokenizer.json: {' '.join(str(error).split())}"
            ) from None
        tokenizer = cls(backend, f"tokenizer {path}")
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise DataError(
                f"tokenizer {path}: has {tokenizer.vocab_size} tokens, model.vocab_size is "
                f"only {vocab_size}"
            )
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, whole or not at all. Raises OSError."""
        write_atomic(Path(path), self._backend.to_str(pretty=False).encode("utf-8"))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without `<eod>`.

        Raises DataError if the text has half characters (lone surrogates) or would come back
        changed.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all processors. Raises DataError as `encode` does."""
        ids_of = self._encode(texts)
        for text, ids in zip(texts, ids_of):
            back = b"".join([self._bytes[i] for i in ids])
            if back != text.encode("utf-8"):
                setting = _what_loses(json.loads(self._backend.to_str()), text)
                raise DataError(
                    f"{self._name}: text is changed by {setting} "
                    f"({_difference(text, back.decode('utf-8', 'replace'))}); "
                    "take it out of the file, or leave data.tokenizer out to train one"
                )
        return ids_of

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise DataError("a text is not valid Unicode: it contains lone surrogates") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; `<eod>` is nothing, ids beyond the vocabulary are nothing, bytes that
        are no character U+FFFD.
        """
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes one id stands for, which may be a part of a character; empty for ids without
        text.
        """
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def bytes_of_all(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids of the vocabulary stand for together."""
        return b"".join([self._bytes[i] for i in ids])


def _own_pieces() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _is_own(values: dict[str, Any]) -> bool:
    """Whether a tokenizer.json goes about a text as those that are trained here."""
    own = tokenizers.Tokenizer(models.BPE())
    own.pre_tokenizer = _own_pieces()
    return bool(
        values["pre_tokenizer"] == json.loads(own.to_str())["pre_tokenizer"]
        and not values["normalizer"]
        and [token["content"] for token in values["added_tokens"]] == [END_OF_DOCUMENT]
    )


class StreamDecoder:
    """Decodes token by token; holds back the bytes of a character until it is whole.

    The pieces put together are `Tokenizer.decode` of all ids, so U+FFFD appears only for bytes that
    are no character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters this id completes, often none."""
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def flush(self) -> str:
        """What is left when the text ends: nothing, or U+FFFD if it ended within a character."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character; this is the way back."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


def _bytes_of_tokens(
    vocabulary: dict[str, int], added: dict[int, str], end_of_document: int
) -> list[bytes]:
    """The bytes of every id; `added` tokens stand for their characters as they are."""
    byte_of = _byte_of_character()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, identifier in vocabulary.items():
        if identifier == end_of_document:
            continue
        try:
            pieces[identifier] = (
                added[identifier].encode("utf-8")
                if identifier in added
                else bytes([byte_of[character] for character in token])
            )
        except KeyError:
            raise DataError(
                f"its token {token!r} is not made of bytes: only byte-level BPE loses nothing"
            ) from None
    if not all(character in vocabulary for character in byte_of):
        raise DataError("some of the 256 bytes are no tokens: only byte-level BPE loses nothing")
    return pieces


def _check_model(model: dict[str, Any]) -> None:
    """Refuse, before the library stumbles over it, a model that cannot be byte-level BPE."""
    if model.get("type", "BPE") != "BPE":
        raise DataError(f"model type {model['type']}: only byte-level BPE loses nothing")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise DataError(
                f"model {key} {model[key]!r}: only byte-level BPE without it loses nothing"
            )


def _switch_off(values: dict[str, Any]) -> list[str]:
    """Change a tokenizer.json's `values` to take out what cuts, fills or varies texts; returns
    the names of it.
    """
    off = [key for key in ("truncation", "padding", "post_processor") if values.get(key)]
    values.update(dict.fromkeys(off))
    if values["model"].get("dropout"):
        values["model"]["dropout"] = None
        off.append("model dropout")
    for kind, leaf in _stages(values):
        if leaf["type"] == "ByteLevel" and leaf.get("add_prefix_space"):
            leaf["add_prefix_space"] = False
            off.append(f"{kind} ByteLevel add_prefix_space")
    for token in values["added_tokens"]:
        for key in ("lstrip", "rstrip"):
            if token[key]:
                token[key] = False
                off.append(f"added token {token['content']!r} {key}")
    return off


def _stages(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """("normalizer" or "pre_tokenizer", settings) of each stage a text goes through, sequences
    taken apart.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    waiting = [(kind, values[kind]) for kind in ("pre_tokenizer", "normalizer") if values.get(kind)]
    while waiting:
        kind, stage = waiting.pop()
        if stage["type"] == "Sequence":
            parts = stage["normalizers" if kind == "normalizer" else "pretokenizers"]
            waiting += [(kind, part) for part in reversed(parts)]
        else:
            found.append((kind, stage))
    return found


def _what_loses(values: dict[str, Any], text: str) -> str:
    """Name the settings of a tokenizer.json that do not give this text back."""
    character_of = {byte: character for character, byte in _byte_of_character().items()}
    forms = (text, "".join([character_of[byte] for byte in text.encode("utf-8")]))
    stages = [(kind, stage) for kind, stage in _stages(values) if stage["type"] != "ByteLevel"]
    losing = [
        f"{kind} {stage['type']}"
        for kind, stage in stages
        if any(_passed(kind, stage, form) != form for form in forms)
    ]
    if losing:
        return ", ".join(losing)
    if stages == _stages(values):
        return "a pre_tokenizer without ByteLevel"
    present = [
        f"added token {token['content']!r}"
        for token in values["added_tokens"]
        if token["content"] in text
    ]
    return present[0] if present else "its model"


def _passed(kind: str, stage: dict[str, Any], text: str) -> str:
    """What one stage alone makes of a text."""
    alone = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    alone[kind] = stage
    backend = tokenizers.Tokenizer.from_str(json.dumps(alone))
    if kind == "normalizer":
        return backend.normalizer.normalize_str(text)
    return "".join([piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)])


def _difference(text: str, back: str) -> str:
    """Where two texts part, in a few characters of each."""
    at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
    at = max(at - 3, 0)
    return f"{text[at : at + 12]!r} comes back as {back[at : at + 12]!r}"
