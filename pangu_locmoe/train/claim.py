"""A run directory belongs to one process at a time: a lock that a dead process does not hold, on
a file in it.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, List, Optional

import numpy as np
from mindspore import Tensor

from pangu_locmoe.errors import CheckpointError, ConfigError
from pangu_locmoe.parallel.agreement import together
from pangu_locmoe.parallel.communicator import Communicator

LOCK = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that has none


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold a run directory, made if need be; of what was made, nothing empty is left behind.

    Raises:
        ConfigError: another process holds it; the message names process and host.
        CheckpointError: it cannot be made or written.
    """
    made: List[Path] = []
    try:
        try:
            descriptor = _lock(run_dir, made)
        except OSError as error:
            raise CheckpointError(f"{run_dir} cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            with suppress(OSError):
                (run_dir / LOCK).unlink()
            os.close(descriptor)
    finally:
        _remove_empty(made)


@contextmanager
def default_run_dir(
    name: str, router: str, resume: bool, communicator: Communicator
) -> Iterator[Path]:
    """runs/NAME-ROUTER, with a number where that is taken; to resume, the newest of them.

    Rank 0 makes it, so that no other run takes it.
    """
    stem = f"{name}-{router.rpartition(':')[2]}"
    made: List[Path] = []
    number = 0
    try:
        with together(communicator):
            if communicator.rank == 0:
                number = _take(stem, resume, made)
        yield _numbered(
            stem, int(communicator.all_gather(Tensor(np.array([number], np.int32))).asnumpy()[0, 0])
        )
    finally:
        _remove_empty(made)


def _take(stem: str, resume: bool, made: List[Path]) -> int:
    try:
        for number in itertools.count(1):
            path = _numbered(stem, number)
            if resume and path.exists() and not _numbered(stem, number + 1).exists():
                return number
            before = len(made)
            _make(path, made)
            if len(made) > before:
                return number
    except OSError as error:
        raise CheckpointError(f"{path} cannot be made: {error.strerror}") from None
    raise AssertionError("there is always another number")


def _numbered(stem: str, number: int) -> Path:
    return Path("runs") / (stem if number == 1 else f"{stem}-{number}")


def _lock(run_dir: Path, made: List[Path]) -> int:
    """The open, locked file, with who has it as its content."""
    file = run_dir / LOCK
    for last in [False] * 99 + [True]:
        _make(run_dir, made)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            if last:
                raise
            continue  # another start has just given up and removed the directory
        if not _try_lock(descriptor):
            holder = (
                os.pread(descriptor, 500, 0).decode("utf-8", errors="replace").strip()
                or "another process"
            )
            os.close(descriptor)
            raise ConfigError(
                f"--run-dir {run_dir}: {holder} is training there; wait for it or stop it, "
                "or give another directory"
            )
        # Whoever had it may have removed the file before he let go of it.
        if _inode(file) == os.fstat(descriptor).st_ino:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)
    raise ConfigError(f"--run-dir {run_dir}: is taken and given up by others all the time")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


def _inode(file: Path) -> Optional[int]:
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return None


def _make(folder: Path, made: List[Path]) -> None:
    """mkdir -p; appends what was not there and this process made, outermost first."""
    if not folder.is_dir():
        _make(folder.parent, made)
        with suppress(FileExistsError):
            folder.mkdir()
            made.append(folder)


def _remove_empty(made: List[Path]) -> None:
    for folder in reversed(made):
        with suppress(OSError):
            folder.rmdir()
