"""Work on pieces of a corpus in several processes, whose results come in the order of the work.

What was done can be kept in a folder, so that a preparation that was ended goes on: a result is
found again by the content that it is of, whoever asks for it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Optional

import numpy as np

from pangu_locmoe.errors import DataError

Arrays = tuple[np.ndarray, ...]
_AHEAD = 2
"""Pieces of work that wait for each process: enough that none waits, little enough for the memory."""


class Workers:
    """`count` processes; 1: this one. Use as a context."""

    def __init__(self, count: int, keep: Optional[Path] = None) -> None:
        """`keep`: where results are kept; None: nowhere."""
        self._ahead = _AHEAD * count
        self._keep = keep
        self._pool: Optional[ProcessPoolExecutor] = None
        if count > 1:
            context = multiprocessing.get_context("spawn")  # MindSpore has threads
            self._pool = ProcessPoolExecutor(count, context, _begin)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def queue(self, function: Callable[..., Arrays], done: Callable[..., None]) -> Queue:
        """Work to be done by one function of this package."""
        return Queue(self._pool, self._ahead, self._keep, function, done)


class Queue:
    """Hands work out, and its results to `done` in the order in which it came."""

    def __init__(
        self,
        pool: Optional[ProcessPoolExecutor],
        ahead: int,
        keep: Optional[Path],
        function: Callable[..., Arrays],
        done: Callable[..., None],
    ) -> None:
        self._pool = pool
        self._ahead = ahead
        self._keep = keep
        self._function = function
        self._done = done
        self._waiting: deque[tuple[Any, Future[Arrays]]] = deque()

    def add(self, remark: Any, *arguments: Any) -> None:
        """`done` gets the remark and what the function makes of the arguments."""
        if self._pool is None:
            self._done(remark, *_result(self._keep, self._function, arguments))
            return
        future = self._pool.submit(_result, self._keep, self._function, arguments)
        self._waiting.append((remark, future))
        while len(self._waiting) > self._ahead:
            self._take()

    def finish(self) -> None:
        """Wait for the rest."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        remark, future = self._waiting.popleft()
        try:
            result = future.result()
        except BrokenProcessPool:
            raise DataError(
                "a process that prepares the data was ended; is the memory full? data.workers: 1 "
                "takes least"
            ) from None
        self._done(remark, *result)


def _begin() -> None:
    """What a process does first: it ends with the one that started it, and leaves Ctrl-C to that
    one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have work of their own
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _result(
    keep: Optional[Path], function: Callable[..., Arrays], arguments: Sequence[Any]
) -> Arrays:
    if keep is None:
        return function(*arguments)
    file = keep / f"{_key(function.__name__, arguments)}.npz"
    with suppress(OSError, ValueError, KeyError), np.load(file) as archive:
        return tuple(archive[f"arr_{i}"] for i in range(len(archive.files)))
    arrays = function(*arguments)
    with suppress(OSError):  # a full disk is reported where what is for good is written
        _save(file, arrays)
    return arrays


def _save(file: Path, arrays: Arrays) -> None:
    descriptor, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            np.savez(out, *arrays)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _key(name: str, arguments: Sequence[Any]) -> str:
    """A digest of everything that decides a result."""
    digest = hashlib.blake2b(name.encode(), digest_size=16)
    for content in _contents(arguments):
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()


def _contents(values: Sequence[Any]) -> Iterator[bytes]:
    """A path says where something is, and not what."""
    for value in values:
        if isinstance(value, Path):
            continue
        if isinstance(value, (list, tuple)):
            yield len(value).to_bytes(8, "big")
            yield from _contents(value)
        elif isinstance(value, np.ndarray):
            yield b"ids"
            yield value.tobytes()
        else:
            yield value if isinstance(value, bytes) else str(value).encode("utf-8")
