"""What is printed never decides what becomes of a run: a closed pipe, a terminal that is gone, a
full disk, a narrow encoding.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import Any, Iterator, Optional, TextIO

from pangu_locmoe.errors import LocMoEError


@contextmanager
def forgiving(output_too: bool = True) -> Iterator[None]:
    """While inside, printing to standard error cannot fail; once it cannot be written, the rest is
    dropped.

    Args:
        output_too: the same for standard output. False: it is what the command is for, so that its
            loss is an error; but what its encoding lacks is written as \\uXXXX all the same.
    """
    _open_missing()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Stream(sys.stdout, output_too), _Stream(sys.stderr, True)  # type: ignore[assignment]
    try:
        yield
        sys.stdout.flush()
    finally:
        with suppress(OSError, LocMoEError):
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Stream:
    """A text stream around another one, or around none."""

    def __init__(self, stream: Optional[TextIO], may_be_lost: bool) -> None:
        # Without standard output a program has None in its place.
        self._stream: Any = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: PTH123, SIM115
        self._may_be_lost = may_be_lost
        self._lost = False

    def write(self, text: str) -> int:
        with self._watched():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self._stream, "encoding", None) or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._watched():
            self._stream.flush()

    def isatty(self) -> bool:
        with self._watched():
            return not self._lost and bool(self._stream.isatty())
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            if not self._lost:
                yield
            else:
                with suppress(OSError, ValueError):
                    yield
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._lost = True
            self._drop_the_rest()
            if not self._may_be_lost:
                if isinstance(error, BrokenPipeError):
                    raise
                reason = getattr(error, "strerror", None) or error
                raise LocMoEError(f"standard output cannot be written: {reason}") from None

    def _drop_the_rest(self) -> None:
        """What waits in buffers, here or in libraries, goes nowhere: else it would fail once
        more when the program ends.
        """
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


def _open_missing() -> None:
    """A descriptor that was closed at the start would be given to the next file, and what
    libraries print would go there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free one
