"""Documents with a domain and a split, read twice: once to decide, once to use.

The first reading keeps only hashes and a size of each document (table.py), so that a corpus need not
fit in memory. All decisions come from hashes of the content: which documents are held out does not
change when others are added, and a limit takes its documents from everywhere instead of from the
beginning of the alphabet. Near-copies are on one side, that of the document among them with the
smallest hash, so only a near-copy that comes can move them.

D = documents in the order of reading.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from pangu_locmoe.config import DataConfig
from pangu_locmoe.data.alike import Sketcher
from pangu_locmoe.data.documents import (
    Columns,
    CorpusReport,
    Text,
    content_of,
    has_columns,
    pieces,
    pieces_of_ids,
    read_documents,
    source_files,
)
from pangu_locmoe.data.finding import shown
from pangu_locmoe.data.table import Found, Table, first_of_copies, within
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.data.workers import Arrays, Queue, Workers
from pangu_locmoe.errors import DataError

SPLITS = ("train", "validation")
_CHUNK_BYTES = 1_000_000
_CHUNK_DOCUMENTS = 4096
"""What is hashed at a time: enough to be worth handing over."""

Piece = Text
"""A text that is to be tokenized, or ids: a document or a part of one."""


class SourceFile(NamedTuple):
    """A file and what its source says of it."""

    domain: str
    path: Path
    columns: Columns = Columns()


class Corpus:
    """What `scan` decided.

    `documents` reads the text again, in the order of sources, names and lines.
    """

    def __init__(
        self,
        config: DataConfig,
        domains: Sequence[str],
        files: list[SourceFile],
        table: Table,
        report: CorpusReport,
        tokenizer: Optional[Tokenizer] = None,
    ) -> None:
        self.domains = tuple(domains)
        self.files = files
        self.report = report
        self._config = config
        self._table = table
        self._tokenizer = tokenizer

    def documents(
        self, split: Optional[str] = None, max_bytes: Optional[int] = None
    ) -> Iterator[tuple[int, str, list[Piece]]]:
        """Yield (domain, split, the document's pieces of at most data.max_document_bytes).

        `split`: only that side. `max_bytes`: only a sample of about so many bytes from each domain.
        Raises DataError if the files changed since they were scanned.
        """
        table = self._table
        wanted_D, keep_D = table.used_D, table.keep_D
        if split is not None:
            wanted_D = wanted_D & (table.validation_D == (split == "validation"))
        if max_bytes is not None:
            wanted_D, keep_D = within(table, wanted_D, len(self.domains), max_bytes)
        missing = int(wanted_D.sum())
        for row, text in self._wanted(wanted_D):
            content = content_of(text, self._tokenizer)
            if _digest(content) != tuple(table.digests_D2[row].tolist()):
                continue
            missing -= 1
            side = SPLITS[int(table.validation_D[row])]
            keep = max(int(keep_D[row]), 4) if keep_D[row] < table.size_D[row] else None
            yield int(table.domain_D[row]), side, self._pieces(text, keep)
        if missing:
            raise DataError(
                f"data.sources: {missing} documents changed or vanished while they "
                "were read; start again"
            )

    def _wanted(self, wanted_D: np.ndarray) -> Iterator[tuple[int, Text]]:
        """Number and text of each wanted document, from the files that have some."""
        starts = self._table.starts
        for number, file in enumerate(self.files):
            row, end = starts[number], starts[number + 1]
            if not wanted_D[row:end].any():
                continue
            texts = _texts(file, self.domains, self._config, CorpusReport(), self._tokenizer)
            for _, text in texts:
                if row < end and wanted_D[row]:
                    yield row, text
                row += 1

    def _pieces(self, text: Text, keep: Optional[int]) -> list[Piece]:
        limit = self._config.max_document_bytes
        if isinstance(text, str):
            if keep is not None:
                text = next(pieces(text, keep))
            return list(pieces(text, limit))
        assert self._tokenizer is not None
        sizes = self._tokenizer.token_bytes
        if keep is not None:
            text = next(pieces_of_ids(text, sizes[text], keep))
        return list(pieces_of_ids(text, sizes[text], limit))


def corpus_files(config: DataConfig, report: Optional[CorpusReport] = None) -> list[SourceFile]:
    """Every file, in the order of the sources; what is passed over goes to `report`.

    Raises DataError naming a source without files, or with columns that none of its files has.
    """
    report = report or CorpusReport()
    if not config.sources:
        raise DataError("data.sources: name at least one file, folder or glob with its domain")
    found = []
    for source in config.sources:
        columns = Columns(source.text_column, source.domain_column)
        paths = source_files(source.path, report)
        if columns != Columns() and not any(has_columns(path) for path in paths):
            raise DataError(
                f"data.sources: {source.path}: text_column and domain_column are of JSON lines and "
                "Parquet, and none of its files is that; leave them out"
            )
        found += [SourceFile(source.domain, path, columns) for path in paths]
    return found


def scan(
    config: DataConfig,
    domains: Sequence[str],
    tokenizer: Optional[Tokenizer] = None,
    workers: Optional[Workers] = None,
    seen: Callable[[int], object] = bool,
    folder: Optional[Path] = None,
) -> Corpus:
    """Read everything once: remove duplicates, hold documents out, apply the limits.

    Args:
        tokenizer: of sources that are token ids.
        workers: who hashes; None: this process.
        seen: told the bytes of what was read.
        folder: where the disk has room for hashes; None: where temporary files go.

    Raises DataError if a source has no files or a domain fewer than two documents (one to train on,
    one held out).
    """
    report = CorpusReport()
    files = corpus_files(config, report)
    reading = _Reading(config, domains, report, tokenizer, workers or Workers(1), seen, folder)
    for file in files:
        reading.read(file)
    table = reading.table()
    reading.count_copies(table, files)
    report.cut = int((table.used_D & (table.size_D > config.max_document_bytes)).sum())
    _choose_sides(table, config, reading.found.groups(table.used_D), report)
    _within_limits(table, config, domains, report)
    _count(table, domains, report)
    return Corpus(config, domains, files, table, report, tokenizer)


class _Reading:
    """The first reading."""

    def __init__(
        self,
        config: DataConfig,
        domains: Sequence[str],
        report: CorpusReport,
        tokenizer: Optional[Tokenizer],
        workers: Workers,
        seen: Callable[[int], object],
        folder: Optional[Path],
    ) -> None:
        self.found = Found(folder)
        self._config = config
        self._domains = domains
        self._report = report
        self._tokenizer = tokenizer
        self._seen = seen
        self._queue: Queue = workers.queue(hash_all, self.found.add)
        self._starts = [0]
        self._rows = 0
        self._noted_at = dict.fromkeys(report.problems, 0)
        """How many documents had been read when a problem was met first."""
        self._waiting: list[bytes] = []
        self._waiting_domains: list[int] = []
        self._waiting_bytes = 0

    def read(self, file: SourceFile) -> None:
        for domain, text in _texts(
            file, self._domains, self._config, self._report, self._tokenizer
        ):
            self._note()
            self._add(self._domains.index(domain), content_of(text, self._tokenizer))
        self._note()
        self._starts.append(self._rows)

    def _note(self) -> None:
        if len(self._noted_at) < len(self._report.problems):
            for problem in self._report.problems:
                self._noted_at.setdefault(problem, self._rows)

    def _add(self, domain: int, content: bytes) -> None:
        self._rows += 1
        self._waiting.append(content)
        self._waiting_domains.append(domain)
        self._waiting_bytes += len(content)
        self._seen(len(content))
        if self._waiting_bytes >= _CHUNK_BYTES or len(self._waiting) >= _CHUNK_DOCUMENTS:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._waiting:
            self._queue.add(self._waiting_domains, self._waiting)
        self._waiting = []
        self._waiting_domains = []
        self._waiting_bytes = 0

    def table(self) -> Table:
        """What was read; only the first of copies is used."""
        self._hand_over()
        self._queue.finish()
        digests_D2 = self.found.digests.array().reshape(-1, 2)
        sizes_D = self.found.sizes.array()
        domains_D = self.found.domains.array()
        table = Table(digests_D2, sizes_D, domains_D, self._starts, first_of_copies(digests_D2))
        table.keep_D = sizes_D
        return table

    def count_copies(self, table: Table, files: list[SourceFile]) -> None:
        """In the report, as if they had been counted while they were read."""
        copies = np.flatnonzero(~table.used_D)
        if not len(copies):
            return
        problems = self._report.problems
        before = [name for name in problems if self._noted_at[name] <= copies[0]]
        order = [*before, "duplicate", *(name for name in problems if name not in before)]
        places = np.searchsorted(table.starts, copies[:3], side="right") - 1
        for place in places:
            self._report.count("duplicate", shown(files[place].path))
        problems["duplicate"] = len(copies)
        self._report.problems = Counter({name: problems[name] for name in order})
        examples = self._report.examples
        self._report.examples = {name: examples[name] for name in order}


def hash_all(contents: list[bytes]) -> Arrays:
    """Of each document: digest uint64 [n, 2], size int64 [n], sketch uint64 [n, bands]."""
    sketcher = _sketcher()
    return (
        np.array([_digest(content) for content in contents], np.uint64),
        np.array([len(content) for content in contents], np.int64),
        np.stack([sketcher.sketch(content) for content in contents]),
    )


@functools.lru_cache(maxsize=1)
def _sketcher() -> Sketcher:
    return Sketcher()


def _texts(
    file: SourceFile,
    domains: Sequence[str],
    config: DataConfig,
    report: CorpusReport,
    tokenizer: Optional[Tokenizer],
) -> Iterator[tuple[str, Text]]:
    """Yield (domain, text) of each document."""
    for domain, text in read_documents(
        file.path, domains, config.max_document_bytes, report, file.columns, tokenizer
    ):
        yield domain or file.domain, text


def _digest(content: bytes) -> tuple[int, int]:
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _choose_sides(
    table: Table, config: DataConfig, group_D: np.ndarray, report: CorpusReport
) -> None:
    """By the hash, and near-copies by that of the one whose `order` is smallest, which says nothing
    of it.
    """
    bound = np.uint64(min(math.ceil(config.validation_fraction * 2.0**64), 2**64 - 1))
    table.validation_D = table.digests_D2[:, 0] < bound
    table.group_D = _without_common(group_D, table)
    member = np.flatnonzero(table.group_D >= 0)
    # The leader of each group comes first in it.
    member = member[np.lexsort((table.order_D[member], table.group_D[member]))]
    _, leader, of_member, sizes = np.unique(
        table.group_D[member], return_index=True, return_inverse=True, return_counts=True
    )
    table.validation_D[member] = table.validation_D[member[leader]][of_member]
    report.alike = int(sizes[sizes > 1].sum())


def _without_common(group_D: np.ndarray, table: Table) -> np.ndarray:
    """The groups, -1 - number for a document alone, and for those of groups with more than half of
    a domain: what most of a domain is alike in is its manner, and its documents are held out one
    by one.
    """
    alone_D = -1 - np.arange(len(group_D))
    used = np.flatnonzero(table.used_D)
    if not len(used):
        return alone_D
    documents = np.bincount(table.domain_D[used])
    pairs, sizes = np.unique(
        group_D[used] * len(documents) + table.domain_D[used], return_counts=True
    )
    common = np.unique(pairs[2 * sizes > documents[pairs % len(documents)]] // len(documents))
    members = np.bincount(group_D[used])
    kept_D = table.used_D & ~np.isin(group_D, common)
    kept_D[used] &= members[group_D[used]] > 1
    return np.where(kept_D, group_D, alone_D)


def _both_sides(table: Table, mine_D: np.ndarray, domain: str, report: CorpusReport) -> None:
    """Move documents where the hash left a side empty: the nearest to it, with its near-copies."""
    count = int(mine_D.sum())
    if count < 2:
        problems = ", ".join(f"{number} {problem}" for problem, number in report.problems.items())
        raise DataError(
            f"data.sources: domain {domain} has "
            f"{'one document' if count else 'no documents'}, at least 2 are needed to hold "
            "one out"
            f"{'; cut the file into several or into JSON lines' if count else ''}{f' (left out: {problems})' if problems else ''}"
        )
    sides = set(table.validation_D[mine_D].tolist())
    for validation in (True, False):
        if validation not in sides:
            nearest = table.first_by_hash(mine_D, last=not validation)
            moved_D = mine_D & (table.group_D == table.group_D[nearest])
            table.validation_D[moved_D] = validation


def _within_limits(
    table: Table, config: DataConfig, domains: Sequence[str], report: CorpusReport
) -> None:
    """Share data.max_bytes_per_domain between the sides, so that neither can use it up."""
    for index, domain in enumerate(domains):
        _both_sides(table, table.used_D & (table.domain_D == index), domain, report)
    all_D = table.used_D
    if config.max_bytes_per_domain is not None:
        keep_D = table.keep_D.copy()
        used_D = np.zeros(len(all_D), bool)
        for validation, part in (
            (False, 1 - config.validation_fraction),
            (True, config.validation_fraction),
        ):
            side_D = all_D & (table.validation_D == validation)
            limit = int(config.max_bytes_per_domain * part)
            taken_D, kept_D = within(table, side_D, len(domains), limit)
            used_D |= taken_D
            keep_D[taken_D] = kept_D[taken_D]
        table.used_D, table.keep_D = used_D, keep_D
    for index, domain in enumerate(domains):
        mine_D = table.domain_D == index
        report.over_limit[domain] = int((all_D & mine_D).sum() - (table.used_D & mine_D).sum())


def _count(table: Table, domains: Sequence[str], report: CorpusReport) -> None:
    for split in SPLITS:
        side_D = table.used_D & (table.validation_D == (split == "validation"))
        documents = np.bincount(table.domain_D[side_D], minlength=len(domains))
        kept = np.zeros(len(domains), np.int64)
        np.add.at(kept, table.domain_D[side_D], table.keep_D[side_D])
        report.documents[split] = Counter(
            {domain: int(n) for domain, n in zip(domains, documents) if n}
        )
        report.bytes[split] = Counter({domain: int(n) for domain, n in zip(domains, kept)})
