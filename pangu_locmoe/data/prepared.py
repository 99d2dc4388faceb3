"""A corpus made ready to train on: tokenizer, sequences in MindRecord files, and what was measured
on the way.

Everything that decides the result is in the name of its folder, so a change of the corpus or of a
setting that matters makes a new one and anything else finds the old one again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pangu_locmoe.config import Config
from pangu_locmoe.data.copies import RUN
from pangu_locmoe.data.corpus import SPLITS, SourceFile, corpus_files
from pangu_locmoe.data.documents import Columns, CorpusReport
from pangu_locmoe.data.finding import shown
from pangu_locmoe.data.megatron import ids_file, is_index
from pangu_locmoe.data.preparing import build
from pangu_locmoe.data.records import read_sequences
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.errors import DataError

_FORMAT = 2
"""Raised when prepared folders of an earlier version no longer fit."""


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, read.

    Domain indices are positions in `domains`; V = model.vocab_size, S = model.seq_length.
    """

    path: Path
    domains: tuple[str, ...]
    seq_length: int
    tokenizer: Tokenizer
    token_counts: np.ndarray
    """int64 [domains, V], how often each token occurs in the training text of each domain."""
    num_sequences: dict[str, list[int]]
    """split -> sequences of each domain."""
    bigram_bits_per_byte: dict[str, float]
    """Bits per byte of a byte bigram on the validation text, by domain and "all"."""
    report: CorpusReport
    counts: dict[str, dict[str, dict[str, int]]]
    """split -> domain -> documents, bytes, tokens, sequences, unused_tokens."""
    copies: dict[str, dict[str, int]]
    """domain -> validation tokens "searched" for in the training text, and "copied": in runs of
    32 and more found there.
    """
    tokenizer_switched_off: list[str]
    """Settings of the given tokenizer.json that are not in force (`Tokenizer.switched_off`)."""
    files: dict[str, list[list[Path]]]
    """split -> MindRecord files of each domain."""
    identity: dict[str, Any]
    """What makes it the same data as another preparation; see identity.py."""
    document_starts: list[np.ndarray]
    """Of each domain, the position of each validation document's `<eod>` in the stream, int64
    [documents].
    """

    def sequences(self, split: str, domain: int, indices: Sequence[int]) -> np.ndarray:
        """The sequences with these numbers, int32 [n, S+1].

        Raises DataError if the files are damaged.
        """
        rows = list(read_sequences(self.files[split][domain], indices))
        return np.stack(rows) if rows else np.empty((0, self.seq_length + 1), np.int32)

    def target_documents(self, domain: int, indices: Sequence[int]) -> np.ndarray:
        """The document that each target of these validation sequences belongs to, int64 [n, S]; -1:
        padding, no text.

        The `<eod>` that ends a document is a target of that document, though it also begins the
        next.
        """
        place_nS = np.asarray(indices, np.int64)[:, None] * self.seq_length + np.arange(
            1, self.seq_length + 1
        )
        document_nS = np.searchsorted(self.document_starts[domain], place_nS, side="left") - 1
        return np.where(
            place_nS < self.counts["validation"][self.domains[domain]]["tokens"], document_nS, -1
        )

    def summary(self) -> str:
        """Lines for a person: what was read, what became of it, and the yardstick."""
        lines = [self.report.summary()]
        for domain in self.domains:
            train = self.counts["train"][domain]
            validation = self.counts["validation"][domain]
            copies = self.copies[domain]
            lines.append(
                f"  {domain}: {train['tokens']} training tokens "
                f"({train['bytes'] / max(train['tokens'], 1):.2f} bytes each), "
                f"{train['sequences']} + {validation['sequences']} sequences, bigram "
                f"{self.bigram_bits_per_byte[domain]:.3f} bits/byte"
            )
            lines.append(
                f"  {domain}: {copies['copied'] / max(copies['searched'], 1):.1%} of "
                f"{copies['searched']} validation tokens "
                f"are in runs of {RUN} and more that the training text has too"
            )
        if self.tokenizer_switched_off:
            lines.append(f"  tokenizer: not in force: {', '.join(self.tokenizer_switched_off)}")
        return "\n".join(lines)


def prepare(config: Config, progress: bool = True) -> Prepared:
    """Find the prepared data of this configuration or make it.

    Raises DataError if that cannot be done.

    It is built beside and renamed when whole: one that was killed leaves nothing that looks
    finished.
    """
    path = Path(config.data.prepared_dir) / fingerprint(config)
    if not (path / "prepared.json").is_file():
        build(config, path, progress)
    return load_prepared(path)


def fingerprint(config: Config) -> str:
    """16 hexadecimal digits of everything that decides the result.

    Raises DataError if a source has no files.
    """
    data = config.data
    values: dict[str, Any] = {
        "format": _FORMAT,
        "domains": config.domains,
        "files": [_file(file) for file in corpus_files(data)],
        "limits": [data.max_document_bytes, data.max_bytes_per_domain, data.validation_fraction],
        "sizes": [config.model.vocab_size, config.model.seq_length],
        "tokenizer": None,
    }
    if data.tokenizer is not None:
        try:
            values["tokenizer"] = hashlib.sha256(Path(data.tokenizer).read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(
                f"data.tokenizer: {data.tokenizer}: cannot be read: {error.strerror}"
            ) from None
    return hashlib.sha256(json.dumps(values).encode("utf-8")).hexdigest()[:16]


def load_prepared(path: Path) -> Prepared:
    """Read a prepared folder. Raises DataError if it is not one or damaged."""
    try:
        values = json.loads((path / "prepared.json").read_text(encoding="utf-8"))
        domains = tuple(values["domains"])
        return Prepared(
            path=path,
            domains=domains,
            seq_length=values["seq_length"],
            tokenizer=Tokenizer.load(path / "tokenizer.json"),
            token_counts=np.load(path / "token_counts.npy"),
            num_sequences={
                split: [values["counts"][split][domain]["sequences"] for domain in domains]
                for split in SPLITS
            },
            bigram_bits_per_byte={
                name: math.nan if bits is None else bits
                for name, bits in values["bigram_bits_per_byte"].items()
            },
            report=CorpusReport.from_dict(values["report"]),
            counts=values["counts"],
            copies=values["copies"],
            tokenizer_switched_off=values["tokenizer_switched_off"],
            files={
                split: [[path / name for name in names] for names in values["files"][split]]
                for split in SPLITS
            },
            identity=values["identity"],
            document_starts=[
                np.load(path / f"validation-{i}-documents.npy") for i in range(len(domains))
            ],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a whole prepared data set ({type(error).__name__}: {error}); "
            "delete it and prepare again"
        ) from None


def _file(file: SourceFile) -> tuple[Any, ...]:
    """What may make other text of a file. Columns are named only where they are not the usual ones,
    so that what was prepared before there were others is found.
    """
    stamps = _stamp(file.path)
    if is_index(file.path):
        stamps += _stamp(ids_file(file.path))
    return (
        file.domain,
        str(file.path),
        *stamps,
        *(file.columns if file.columns != Columns() else ()),
    )


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"data.sources: {shown(path)}: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns
