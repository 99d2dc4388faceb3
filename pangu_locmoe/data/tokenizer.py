"""Text <-> token ids: a byte-level BPE that loses nothing and knows no unknown token.

Every string of bytes has an encoding because all 256 bytes are tokens. Runs of Han characters are a pre-token of
their own, so that no token mixes Chinese with markup or Latin letters. One JSON file in the format of Hugging Face
`tokenizers` holds everything.

V = tokens in this tokenizer's vocabulary (which may be fewer than model.vocab_size).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from pangu_locmoe.errors import DataError
from pangu_locmoe.files import write_atomic

END_OF_DOCUMENT = "<eod>"

# Han runs | contractions | a word with at most one sign before it | up to three digits | signs | line ends | spaces.
# What none of them matches stays a piece of its own, so nothing can be lost here.
_PIECES = (
    r"\p{Han}+|'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})\p{L})+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Byte-level BPE with one special token, `<eod>`, which no text can spell."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a Hugging Face tokenizer. Raises DataError if it is not byte-level or has no `<eod>`."""
        identifier = backend.token_to_id(END_OF_DOCUMENT)
        if identifier is None:
            raise DataError(f"the tokenizer has no {END_OF_DOCUMENT} token; train one by leaving data.tokenizer out")
        # A text that contains the five characters "<eod>" is only a text.
        backend.encode_special_tokens = True
        self._backend = backend
        self.end_of_document: int = identifier
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._bytes = _bytes_of_tokens(backend.get_vocab(with_added_tokens=True), identifier)
        if identifier in self.encode(f"a{END_OF_DOCUMENT}b"):
            raise DataError(f"the tokenizer turns the characters {END_OF_DOCUMENT} in a text into the end of the document")
        self.token_bytes = np.array([len(piece) for piece in self._bytes], np.int32)
        """int32 [V], the bytes of text a token stands for; 0 for `<eod>`."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges until there are `vocab_size` tokens or nothing is left to merge. `<eod>` is id 0."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
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
        """Read a tokenizer.json. Raises DataError if it cannot be read or used, or has more than `vocab_size` tokens."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"tokenizer {path}: cannot be read: {getattr(error, 'strerror', None) or 'not text'}") from None
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"tokenizer {path}: not a tokenizer.json: {' '.join(str(error).split())}") from None
        try:
            tokenizer = cls(backend)
        except DataError as error:
            raise DataError(f"tokenizer {path}: {error}") from None
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise DataError(f"tokenizer {path}: has {tokenizer.vocab_size} tokens, model.vocab_size is only {vocab_size}")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, whole or not at all. Raises OSError."""
        write_atomic(Path(path), self._backend.to_str(pretty=False).encode("utf-8"))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without `<eod>`. Raises DataError if the text has half characters (lone surrogates)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all processors. Raises DataError as `encode` does."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise DataError("a text is not valid Unicode: it contains lone surrogates") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; `<eod>` is nothing, ids beyond the vocabulary are nothing, bytes that are no character U+FFFD."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes one id stands for, which may be a part of a character; empty for ids without text."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""


class StreamDecoder:
    """Decodes token by token; holds back the bytes of a character until it is whole.

    The pieces put together are `Tokenizer.decode` of all ids, so U+FFFD appears only for bytes that are no character.
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
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


def _bytes_of_tokens(vocabulary: dict[str, int], end_of_document: int) -> list[bytes]:
    byte_of = _byte_of_character()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, identifier in vocabulary.items():
        if identifier == end_of_document:
            continue
        try:
            pieces[identifier] = bytes(byte_of[character] for character in token)
        except KeyError:
            raise DataError(f"its token {token!r} is not made of bytes: only byte-level BPE loses nothing") from None
    if not all(character in vocabulary for character in byte_of):
        raise DataError("some of the 256 bytes are no tokens: only byte-level BPE loses nothing")
    return pieces
