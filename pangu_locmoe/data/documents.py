"""Files -> documents: plain text, JSON lines, either of them gzipped; Parquet; Megatron's token ids.

Bad ones are counted, never fatal. A document is text, or the ids of text that is tokenized
already, int32 [n].
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Optional, Union

import numpy as np

from pangu_locmoe.data.finding import PROBLEMS as PROBLEMS_OF_FILES
from pangu_locmoe.data.finding import find_files, shown
from pangu_locmoe.data.megatron import is_index, read_indexed, with_indices
from pangu_locmoe.data.parquet import is_parquet, read_rows
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.errors import DataError

PROBLEMS = {
    **PROBLEMS_OF_FILES,
    "unreadable": "files or folders that could not be opened or unpacked",
    "undecodable": "files that are not UTF-8 text",
    "empty": "documents without text",
    "huge": "files or lines more than 100 times data.max_document_bytes long, left out",
    "bad_line": "JSON lines or rows without a string `text` or with an unknown `domain`",
    "duplicate": "documents that occurred before",
}
_EXAMPLES = 3
_HUGE = 100
_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")

Text = Union[str, np.ndarray]


class Columns(NamedTuple):
    """Where JSON lines and Parquet files have a document's text and its domain."""

    text: str = "text"
    domain: str = "domain"


@dataclass
class CorpusReport:
    """What was read, what was left out and why."""

    files: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    """Count for each key of PROBLEMS that occurred."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first locations where each problem occurred."""
    cut: int = 0
    """Documents longer than data.max_document_bytes, read in pieces."""
    alike: int = 0
    """Documents that are near-copies of others, kept on one side with them."""
    over_limit: Counter[str] = field(default_factory=Counter)
    """Documents of each domain left out by data.max_bytes_per_domain."""
    documents: dict[str, Counter[str]] = field(default_factory=dict)
    """split -> domain -> documents used."""
    bytes: dict[str, Counter[str]] = field(default_factory=dict)
    """split -> domain -> bytes of UTF-8 text used."""

    def count(self, problem: str, location: str) -> None:
        """One more of a key of PROBLEMS; `location` is text that can be printed (`shown`)."""
        self.problems[problem] += 1
        examples = self.examples.setdefault(problem, [])
        if len(examples) < _EXAMPLES:
            examples.append(location)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "files": self.files,
            "problems": dict(self.problems),
            "examples": self.examples,
            "cut": self.cut,
            "alike": self.alike,
            "over_limit": dict(self.over_limit),
            "documents": {split: dict(counts) for split, counts in self.documents.items()},
            "bytes": {split: dict(counts) for split, counts in self.bytes.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CorpusReport:
        """The reverse of `to_dict`."""
        return cls(
            files=values["files"],
            problems=Counter(values["problems"]),
            examples=values["examples"],
            cut=values["cut"],
            alike=values["alike"],
            over_limit=Counter(values["over_limit"]),
            documents={split: Counter(counts) for split, counts in values["documents"].items()},
            bytes={split: Counter(counts) for split, counts in values["bytes"].items()},
        )

    def summary(self) -> str:
        """Lines for a person: one per domain, one per problem."""
        lines = [f"{self.files} files read"]
        for domain in self.documents.get("train", {}):
            parts = [
                (
                    f"{split} {self.documents[split][domain]} documents, "
                    f"{self.bytes[split][domain] / 1e6:.2f} MB"
                )
                for split in self.documents
            ]
            left = (
                f"; {self.over_limit[domain]} documents over data.max_bytes_per_domain"
                if self.over_limit[domain]
                else ""
            )
            lines.append(f"  {domain}: {'; '.join(parts)}{left}")
        if self.cut:
            lines.append(f"  {self.cut} documents cut into pieces of data.max_document_bytes")
        if self.alike:
            lines.append(
                f"  {self.alike} documents are near-copies of others and share a side with them"
            )
        for problem, number in self.problems.items():
            lines.append(
                f"  left out: {number} {PROBLEMS[problem]}, e.g. {self.examples[problem][0]}"
            )
        return "\n".join(lines)


def source_files(path: str, report: CorpusReport) -> list[Path]:
    """The files of one source in sorted order, as `find_files` finds them.

    Raises DataError if there are none.
    """
    before = Counter(report.problems)
    if not os.path.lexists(path) and is_index(Path(f"{path}.idx")):
        path = f"{path}.idx"  # Megatron's way to name both of its files
    files = with_indices(find_files(path, report.count))
    if files:
        return files
    left_out = ", ".join(
        f"{number} {PROBLEMS[problem]}" for problem, number in (report.problems - before).items()
    )
    if left_out:
        raise DataError(f"data.sources: {path}: no file that can be read (left out: {left_out})")
    if Path(path).is_dir():
        raise DataError(f"data.sources: {path}: an empty folder")
    if glob.has_magic(path):
        raise DataError(f"data.sources: {path}: matches no file")
    raise DataError(
        f"data.sources: {path}: no such file or folder; scripts/fetch_corpus.sh makes data/corpus"
    )


def has_columns(path: Path) -> bool:
    """Whether it is a file of which `Columns` says something."""
    return is_parquet(path) or path.name.lower().removesuffix(".gz").endswith(_JSON_LINES)


def read_documents(
    path: Path,
    domains: Collection[str],
    max_bytes: int,
    report: CorpusReport,
    columns: Columns = Columns(),  # noqa: B008 it cannot be changed
    tokenizer: Optional[Tokenizer] = None,
) -> Iterator[tuple[str | None, Text]]:
    """Yield (domain, text) of each document in a file; domain None means its source's.

    Problems go to `report`.

    `.jsonl` (and `.ndjson`, `.jsonlines`) has a document on each line, `.parquet` in each row
    (`columns`), a Megatron index its own; every other file is one document of UTF-8. `.gz` is
    unpacked on the way. Capitals in a suffix make no difference.

    Raises DataError for token ids that are not of `tokenizer`, and for Parquet without its package
    or column.
    """
    report.files += 1
    limit = _HUGE * max_bytes
    if is_parquet(path):
        yield from read_rows(path, columns.text, columns.domain, domains, limit, report.count)
    elif is_index(path):
        if tokenizer is None:
            raise DataError(
                f"data.sources: {shown(path)}: token ids need data.tokenizer, the tokenizer that "
                "they were made with"
            )
        for ids in read_indexed(path, tokenizer, limit, report.count):
            yield None, ids
    else:
        yield from _read_text(path, domains, limit, report, columns)


def _read_text(
    path: Path, domains: Collection[str], limit: int, report: CorpusReport, columns: Columns
) -> Iterator[tuple[str | None, str]]:
    name = path.name.lower()
    location = shown(path)
    try:
        with _open(path, name.endswith(".gz")) as file:
            if has_columns(path):
                yield from _json_lines(file, location, domains, limit, report, columns)
            else:
                yield from _whole(file, location, limit, report)
    except (OSError, EOFError, zlib.error):
        report.count("unreadable", location)


def _open(path: Path, zipped: bool) -> IO[bytes]:
    return gzip.open(path, "rb") if zipped else path.open("rb")  # type: ignore[return-value]


def _whole(
    file: IO[bytes], path: str, limit: int, report: CorpusReport
) -> Iterator[tuple[None, str]]:
    # A limit on the read, not on the file's size: a small .gz may unpack to anything.
    content = file.read(limit + 1)
    if len(content) > limit:
        return report.count("huge", path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return report.count("undecodable", path)
    if "\0" in text:  # some binary files happen to be valid UTF-8
        return report.count("undecodable", path)
    if not text.strip():
        return report.count("empty", path)
    yield None, text


def _json_lines(
    file: IO[bytes],
    path: str,
    domains: Collection[str],
    limit: int,
    report: CorpusReport,
    columns: Columns,
) -> Iterator[tuple[str | None, str]]:
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        location = f"{path}:{number}"
        if len(line) > limit:
            report.count("huge", location)
            while line and not line.endswith(b"\n"):
                line = file.readline(limit)
            continue
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            text = values[columns.text]
            domain = values.get(columns.domain)
            text.encode("utf-8")  # JSON can spell half characters
            known = domain is None or domain in domains
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            report.count("bad_line", location)
            continue
        if not isinstance(text, str) or not known:
            report.count("bad_line", location)
        elif not text.strip():
            report.count("empty", location)
        else:
            yield domain, text


def content_of(text: Text, tokenizer: Optional[Tokenizer] = None) -> bytes:
    """UTF-8, or the bytes that ids stand for, which may end within a character."""
    if isinstance(text, str):
        return text.encode("utf-8")
    assert tokenizer is not None  # or they would not have been read
    return tokenizer.bytes_of_all(text)


def pieces_of_ids(ids: np.ndarray, sizes: np.ndarray, max_bytes: int) -> Iterator[np.ndarray]:
    """Cut ids into pieces that stand for at most `max_bytes` bytes, one token at least; `sizes`:
    the bytes of each id.
    """
    ends = np.cumsum(sizes)
    start = 0
    while start < len(ids):
        before = int(ends[start - 1]) if start else 0
        end = max(int(np.searchsorted(ends, before + max_bytes, side="right")), start + 1)
        yield ids[start:end]
        start = end


def pieces(text: str, max_bytes: int) -> Iterator[str]:
    """Cut a text into pieces of at most `max_bytes` bytes of UTF-8: after a line if one ends
    there, never in a character.
    """
    content = text.encode("utf-8")
    start = 0
    while len(content) - start > max_bytes:
        end = content.rfind(b"\n", start, start + max_bytes) + 1
        if end <= start:
            end = start + max_bytes
            while content[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
        yield content[start:end].decode("utf-8")
        start = end
    yield content[start:].decode("utf-8")
