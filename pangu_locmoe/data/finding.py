"""What a source names -> files: folders are walked, links followed, globs expanded; what is passed
over is counted.

Everything is taken once, so links in a circle end and many links to one place cost nothing.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Optional

PROBLEMS = {
    "dangling": "links that lead nowhere",
    "special": "pipes, sockets and devices",
    "hidden": "files and folders whose names begin with a dot",
    "repeated": "files and folders reached a second time, by a link",
}
"""Why something is passed over, beside "unreadable"."""

Count = Callable[[str, str], None]
"""Takes a problem and where it is."""
Taken = dict[tuple[int, int], Path]
"""Device and number of a file or folder -> the name it was reached by first."""


def find_files(path: str, count: Count) -> list[Path]:
    """The regular files that a file, folder or glob names, sorted by name, each path once.

    Names that begin with a dot are passed over unless the path spells the dot. A glob's folders are
    searched through, and its `**` is any number of folders.
    """
    place = Path(path)
    problems: dict[tuple[str, str], None] = {}

    def note(problem: str, where: str) -> None:
        problems[problem, where] = None  # parts of a glob may come by the same place

    matches: Iterator[Path] = iter([place] if os.path.lexists(place) else [])
    if glob.has_magic(path) and not os.path.lexists(place):
        matches = _expand(
            Path(place.anchor), place.parts[1:] if place.anchor else place.parts, note
        )
    if path.endswith(os.sep):
        matches = filter(_is_folder, matches)
    taken: Taken = {}
    files = {file for match in matches for file in _files(match, taken, note)}
    for problem, where in problems:
        count(problem, where)
    return sorted(files)


def shown(path: Path) -> str:
    """A path that can be printed on one line and written as UTF-8, whatever bytes its name is
    made of.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _files(place: Path, taken: Taken, count: Count) -> Iterator[Path]:
    """The regular files at or below `place`, if not taken before."""
    waiting = [place]
    while waiting:
        path = waiting.pop()
        status = _status(path, count)
        if status is None or not _take(path, status, taken, count):
            continue
        if stat.S_ISREG(status.st_mode):
            yield path
        elif not stat.S_ISDIR(status.st_mode):
            count("special", shown(path))
        else:
            waiting += [path / name for name in reversed(_names(path, "*", count))]


def _expand(folder: Path, parts: tuple[str, ...], count: Count) -> Iterator[Path]:
    """What a glob's `parts` match below a folder."""
    if not parts:
        yield folder
    elif parts[0] == "**":
        for below in _folders(folder, count):
            yield from _expand(below, parts[1:], count)
    elif glob.has_magic(parts[0]):
        for name in _names(folder, parts[0], count) if _is_folder(folder) else []:
            yield from _expand(folder / name, parts[1:], count)
    elif os.path.lexists(folder / parts[0]):
        yield from _expand(folder / parts[0], parts[1:], count)


def _folders(folder: Path, count: Count) -> Iterator[Path]:
    """A folder and all below it, each once."""
    taken: Taken = {}
    waiting = [folder] if _is_folder(folder) else []
    while waiting:
        path = waiting.pop()
        status = _status(path, count)
        if status is not None and _take(path, status, taken, count):
            yield path
            waiting += [path / name for name in reversed(_names(path, "*", count, _is_folder))]


def _names(
    folder: Path, pattern: str, count: Count, wanted: Callable[[Path], bool] = os.path.lexists
) -> list[str]:
    """Sorted names in a folder that match and are `wanted`, without hidden ones unless the
    pattern begins with a dot.
    """
    try:
        names = [
            name
            for name in fnmatch.filter(sorted(os.listdir(folder)), pattern)  # noqa: PTH208
            if wanted(folder / name)
        ]
    except OSError:
        count("unreadable", shown(folder))
        return []
    if pattern.startswith("."):
        return names
    for name in names:
        if name.startswith("."):
            count("hidden", shown(folder / name))
    return [name for name in names if not name.startswith(".")]


def _take(path: Path, status: os.stat_result, taken: Taken, count: Count) -> bool:
    """Whether a place is new; one that was reached by another name is counted."""
    first = taken.setdefault((status.st_dev, status.st_ino), path)
    if first != path:
        count("repeated", shown(path))
    return first is path


def _status(path: Path, count: Count) -> Optional[os.stat_result]:
    """What is there, links followed; None, counted, where nothing can be found out."""
    try:
        return path.stat()
    except OSError as error:
        leads_nowhere = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        count("dangling" if leads_nowhere else "unreadable", shown(path))
        return None


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 Path.is_dir raises where a folder above cannot be searched
