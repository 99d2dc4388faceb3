"""Numbered lines of a text file, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from pangu_locmoe.expert_load.importing.limits import LARGEST_LINE, LineError

GZIP = b"\x1f\x8b"


def opened(path: Path) -> BinaryIO:
    """The file, unpacked as it is read if it is gzipped. Raises OSError."""
    file = path.open("rb")
    zipped = file.read(2) == GZIP
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers. Raises LineError, OSError."""
    with opened(path) as file:
        yield from _decoded(file)


def _decoded(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    number = 0
    try:
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_LINE + 1), b""), start=1):
            if len(line) > LARGEST_LINE:
                raise LineError(number, f"is longer than {LARGEST_LINE >> 20} MiB")
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield number, text
    except UnicodeDecodeError as error:
        raise LineError(number, f"not UTF-8: {error.reason}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LineError(number + 1, f"the gzip stream is damaged: {error}") from None
