"""Documents with a domain and a split, read twice: once to decide, once to use.

The first reading keeps only hashes and a size of each document, so that a corpus need not fit in
memory. All decisions come from hashes of the content: which documents are held out does not change
when others are added, and a limit takes its documents from everywhere instead of from the beginning
of the alphabet. Near-copies are on one side, that of the document among them with the smallest
hash, so only a near-copy that comes can move them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import numpy as np

from pangu_locmoe.config import DataConfig
from pangu_locmoe.data.alike import Sketcher, groups_of_alike
from pangu_locmoe.data.documents import CorpusReport, pieces, read_documents, source_files
from pangu_locmoe.data.finding import shown
from pangu_locmoe.errors import DataError

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Entry:
    """One distinct document."""

    domain: int
    size: int
    """Bytes of UTF-8."""
    split: str
    keep: int
    """Bytes of it that are used; less than `size` where a limit is reached within it."""
    order: int
    """A hash, for taking a sample."""
    file: int
    """Index of the file it is in."""
    group: int = -1
    """The same number for near-copies of each other."""


class Corpus:
    """What `scan` decided.

    `documents` reads the text again, in the order of sources, names and lines.
    """

    def __init__(
        self,
        config: DataConfig,
        domains: Sequence[str],
        files: list[tuple[str, Path]],
        entries: dict[bytes, Entry],
        report: CorpusReport,
    ) -> None:
        self.domains = tuple(domains)
        self.files = files
        """(domain, path) of every file."""
        self.report = report
        self._config = config
        self._entries = entries

    def documents(
        self, split: Optional[str] = None, max_bytes: Optional[int] = None
    ) -> Iterator[tuple[int, str, list[str]]]:
        """Yield (domain, split, the document's pieces of at most data.max_document_bytes).

        `split`: only that side. `max_bytes`: only a sample of about so many bytes from each domain.
        Raises DataError if the files changed since they were scanned.
        """
        wanted = {
            key: entry for key, entry in self._entries.items() if split in (None, entry.split)
        }
        if max_bytes is not None:
            wanted = _limit(wanted, max_bytes)
        limit = self._config.max_document_bytes
        needed = sorted({entry.file for entry in wanted.values()})
        for _, _, text in _texts(
            [self.files[i] for i in needed], self.domains, limit, CorpusReport()
        ):
            entry = wanted.pop(_digest(text), None)
            if entry is not None:
                if entry.keep < entry.size:
                    text = next(pieces(text, max(entry.keep, 4)))
                yield entry.domain, entry.split, list(pieces(text, limit))
        if wanted:
            raise DataError(
                f"data.sources: {len(wanted)} documents changed or vanished while they "
                "were read; start again"
            )


def corpus_files(
    config: DataConfig, report: Optional[CorpusReport] = None
) -> list[tuple[str, Path]]:
    """(domain, path) of every file, in the order of the sources; what is passed over goes to
    `report`.

    Raises DataError naming a source without files.
    """
    report = report or CorpusReport()
    if not config.sources:
        raise DataError("data.sources: name at least one file, folder or glob with its domain")
    return [
        (source.domain, path)
        for source in config.sources
        for path in source_files(source.path, report)
    ]


def scan(config: DataConfig, domains: Sequence[str]) -> Corpus:
    """Read everything once: remove duplicates, hold documents out, apply the limits.

    Raises DataError if a source has no files or a domain fewer than two documents (one to train on,
    one held out).
    """
    report = CorpusReport()
    files = corpus_files(config, report)
    found: dict[bytes, Entry] = {}
    sketcher = Sketcher()
    sketches = []
    for file, domain, text in _texts(files, domains, config.max_document_bytes, report, found):
        digest = _digest(text)
        content = text.encode("utf-8")
        split = (
            "validation"
            if int.from_bytes(digest[:8], "big") < config.validation_fraction * 2.0**64
            else "train"
        )
        size = len(content)
        found[digest] = Entry(
            domains.index(domain), size, split, size, int.from_bytes(digest[8:], "big"), file
        )
        sketches.append(sketcher.sketch(content))
        report.cut += size > config.max_document_bytes
    _keep_alike_together(found, sketches, report)
    entries: dict[bytes, Entry] = {}
    for index, domain in enumerate(domains):
        mine = {key: entry for key, entry in found.items() if entry.domain == index}
        _both_sides(domain, mine, report)
        entries.update(_within_limits(config, mine))
        report.over_limit[domain] = len(mine) - sum(key in entries for key in mine)
    for split in SPLITS:
        chosen = [entry for entry in entries.values() if entry.split == split]
        report.documents[split] = Counter(domains[entry.domain] for entry in chosen)
        report.bytes[split] = Counter(
            {
                domain: sum(e.keep for e in chosen if e.domain == i)
                for i, domain in enumerate(domains)
            }
        )
    return Corpus(config, domains, files, entries, report)


def _texts(
    files: list[tuple[str, Path]],
    domains: Sequence[str],
    max_bytes: int,
    report: CorpusReport,
    seen: Optional[dict[bytes, Entry]] = None,
) -> Iterator[tuple[int, str, str]]:
    """Yield (index of the file, domain, text); with `seen`, only texts whose hash is not among
    its keys.
    """
    for index, (source_domain, path) in enumerate(files):
        for domain, text in read_documents(path, domains, max_bytes, report):
            if seen is not None and _digest(text) in seen:
                report.count("duplicate", shown(path))
            else:
                yield index, domain or source_domain, text


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def _keep_alike_together(
    found: dict[bytes, Entry], sketches: list[np.ndarray], report: CorpusReport
) -> None:
    """Give near-copies their group and one side: that of the one whose `order` is smallest,
    which says nothing of it.
    """
    if not found:
        return
    groups = _without_common(groups_of_alike(np.stack(sketches)).tolist(), list(found.values()))
    leaders: dict[int, Entry] = {}
    for group, entry in zip(groups, found.values()):
        leaders[group] = min(leaders.get(group, entry), entry, key=lambda one: one.order)
    for group, (key, entry) in zip(groups, list(found.items())):
        found[key] = replace(entry, split=leaders[group].split, group=group)
    report.alike = sum(size for size in Counter(groups).values() if size > 1)


def _without_common(groups: list[int], entries: list[Entry]) -> list[int]:
    """The groups, but for those with more than half of a domain: what most of a domain is alike in
    is its manner, and its documents are held out one by one.
    """
    documents = Counter(entry.domain for entry in entries)
    sizes = Counter((group, entry.domain) for group, entry in zip(groups, entries))
    common = {group for (group, domain), size in sizes.items() if 2 * size > documents[domain]}
    return [-1 - number if group in common else group for number, group in enumerate(groups)]


def _both_sides(domain: str, mine: dict[bytes, Entry], report: CorpusReport) -> None:
    """Move documents where the hash left a side empty: the nearest to it, with its near-copies."""
    if len(mine) < 2:
        problems = ", ".join(f"{number} {problem}" for problem, number in report.problems.items())
        raise DataError(
            f"data.sources: domain {domain} has "
            f"{'one document' if mine else 'no documents'}, at least 2 are needed to hold "
            "one out"
            f"{'; cut the file into several or into JSON lines' if mine else ''}{f' (left out: {problems})' if problems else ''}"
        )
    splits = {entry.split for entry in mine.values()}
    for split, nearest in (("validation", min(mine)), ("train", max(mine))):
        if split not in splits:
            moved = [key for key, entry in mine.items() if entry.group == mine[nearest].group]
            for key in moved:
                mine[key] = replace(mine[key], split=split)


def _within_limits(config: DataConfig, mine: dict[bytes, Entry]) -> dict[bytes, Entry]:
    """Share data.max_bytes_per_domain between the sides, so that neither can use it up."""
    if config.max_bytes_per_domain is None:
        return mine
    kept: dict[bytes, Entry] = {}
    for split, part in (
        ("train", 1 - config.validation_fraction),
        ("validation", config.validation_fraction),
    ):
        side = {key: entry for key, entry in mine.items() if entry.split == split}
        kept.update(_limit(side, int(config.max_bytes_per_domain * part)))
    # The order of reading, whatever the order of taking was.
    return {key: kept[key] for key in mine if key in kept}


def _limit(entries: dict[bytes, Entry], max_bytes: int) -> dict[bytes, Entry]:
    """Take documents of each domain by their hash until `max_bytes`; the last one is cut there."""
    left: dict[int, int] = {}
    kept: dict[bytes, Entry] = {}
    for key, entry in sorted(entries.items(), key=lambda item: item[1].order):
        room = left.setdefault(entry.domain, max_bytes)
        if room > 0:
            kept[key] = replace(entry, keep=min(entry.keep, room))
            left[entry.domain] = room - kept[key].keep
    return kept
