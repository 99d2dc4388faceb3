"""Parquet files -> documents, a batch of rows at a time; needs the extra `parquet`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Optional

from pangu_locmoe.data.finding import Count, shown
from pangu_locmoe.errors import DataError

_ROWS = 256
"""Read at a time: a row group may not fit into the memory."""


def is_parquet(path: Path) -> bool:
    return path.name.lower().endswith((".parquet", ".parq"))


def read_rows(
    path: Path,
    text_column: str,
    domain_column: str,
    domains: Collection[str],
    max_bytes: int,
    count: Count,
) -> Iterator[tuple[Optional[str], str]]:
    """Yield (domain, text) of each row; domain None means its source's.

    Rows without a text, with an unknown domain, or with more than `max_bytes` bytes go to `count`, as
    do files that cannot be read. Raises DataError without pyarrow, and for a file without the
    column.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            f"data.sources: {shown(path)}: Parquet needs the package pyarrow: "
            "pip install 'pangu_locmoe[parquet]'"
        ) from None
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise DataError(
                    f"data.sources: {shown(path)}: has no column {text_column!r}; text_column can "
                    f"be {', '.join(names)}"
                )
            columns = [name for name in (text_column, domain_column) if name in names]
            number = 0
            for batch in file.iter_batches(_ROWS, columns=columns, use_threads=False):
                texts = batch.column(text_column).to_pylist()
                own = (
                    batch.column(domain_column).to_pylist()
                    if domain_column in names
                    else [None] * len(texts)
                )
                for text, domain in zip(texts, own):
                    number += 1
                    problem = _problem(text, domain, domains, max_bytes)
                    if problem is None:
                        yield domain, text
                    else:
                        count(problem, f"{shown(path)}:{number}")
    except (OSError, ArrowException, UnicodeDecodeError):
        count("unreadable", shown(path))


def _problem(
    text: object, domain: object, domains: Collection[str], max_bytes: int
) -> Optional[str]:
    if not isinstance(text, str) or (domain is not None and domain not in domains):
        return "bad_line"
    if not text.strip():
        return "empty"
    return "huge" if len(text.encode("utf-8")) > max_bytes else None
