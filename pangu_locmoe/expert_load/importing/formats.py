"""Which reader takes a file: told by its first bytes, its name, or the user."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pangu_locmoe.errors import DataError, one_line
from pangu_locmoe.expert_load.importing import (
    hugging_face,
    megatron,
    sglang,
    sglang_table,
    table,
    vllm,
    vllm_ascend,
)
from pangu_locmoe.expert_load.importing.limits import LARGEST_INDEX, Options, naming
from pangu_locmoe.expert_load.importing.lines import opened
from pangu_locmoe.expert_load.trace import Trace

HEAD = 2**16  # bytes that a file is known by
VLLM_KEYS = (b'"window_expert_load"', b'"snapshots"', b'"physical_to_logical_map"')


@dataclass(frozen=True)
class Format:
    """One system's files.

    Attributes:
        read: (files, options) -> Trace; raises DataError that names the file.
        takes: options that it uses beside num_experts; others are refused.
    """

    read: Callable[[Sequence[Path], Options], Trace]
    takes: tuple[str, ...] = ()


FORMATS = {
    "megatron": Format(megatron.read, ("ranks_per_node",)),
    "csv": Format(table.read, ("ranks_per_node",)),
    "sglang": Format(sglang.read, ("ranks_per_node",)),
    "sglang-csv": Format(sglang_table.read, ("ranks_per_node",)),
    "vllm": Format(vllm.read),
    "vllm-ascend": Format(vllm_ascend.read, ("expert_map",)),
    "huggingface": Format(hugging_face.read, ("top_k",)),
}


def import_trace(
    files: Path | Sequence[Path],
    num_experts: int | None = None,
    ranks_per_node: int = 1,
    format: str | None = None,
    top_k: int | None = None,
    expert_map: Path | None = None,
) -> Trace:
    """Read a load trace of another framework.

    Layers may have any numbers: they become 0, 1, ... in rising order. Memory grows with the trace,
    not with the file, where the file is text.

    Args:
        files: one, or those that belong together: of several ranks, or of several moments.
        num_experts: None: what the file says, or its largest index + 1.
        ranks_per_node: rank r is on node r // ranks_per_node; a column `node` is taken as it is.
        format: one of FORMATS; None: by the files.
        top_k: experts of a token, for router logits.
        expert_map: vllm-ascend's expert_map.json, for its counts by slot.

    Returns a Trace with source_WLNE if the files name ranks or nodes, without dropped_WLE. Raises
    DataError in one line that names the file, and its line or key.
    """
    files = [files] if isinstance(files, Path) else list(files)
    twice = [path for place, path in enumerate(files) if path in files[:place]]
    if twice or not files:
        raise DataError(f"{twice[0]}: is given twice" if twice else "no files")
    options = Options(num_experts, ranks_per_node, top_k, expert_map)
    for name, value in (
        ("num_experts", num_experts),
        ("ranks_per_node", ranks_per_node),
        ("top_k", top_k),
    ):
        if value is not None and not 1 <= value <= LARGEST_INDEX + 1:
            raise DataError(f"{name} {value}: must be 1 to {LARGEST_INDEX + 1}")
    if format not in (None, *FORMATS):
        raise DataError(f"unknown format {format!r}: {', '.join(FORMATS)}")
    name = format or _common_format(files)
    chosen = FORMATS[name]
    for field in fields(Options):
        given = getattr(options, field.name) != field.default
        if given and field.name not in ("num_experts", *chosen.takes):
            users = [other for other, known in FORMATS.items() if field.name in known.takes]
            raise DataError(
                f"{files[0]}: {field.name} is for {', '.join(users)}, the format is {name}"
            )
    return chosen.read(files, options)


def _common_format(files: Sequence[Path]) -> str:
    found = [_recognised(path) for path in files]
    for path, name in zip(files, found):
        if name != found[0]:
            raise DataError(f"{path}: is {name}, {files[0]} is {found[0]}; give files of one kind")
    return found[0]


def _recognised(path: Path) -> str:
    """Text that is nothing else counts as JSON lines, whose reader names the line."""
    with naming(path):
        head = _head(path)
        if head.startswith(b"PK"):
            return _archive_format(path)
        if head.startswith(b"\x93NUMPY"):
            return "vllm-ascend"
        name = path.name.lower()
        if head.startswith(b"\x80") or name.endswith((".pt", ".pth")):
            return "sglang"
        first = head.lstrip(b"\xef\xbb\xbf \r\n").split(b"\n", 1)[0]
        if b"layer_id" in first and b"expert_id" in first and b"{" not in first:
            return "sglang-csv"
        if name.endswith((".csv", ".csv.gz")):
            return "csv"
        if b'"top_indices"' not in head and any(key in head for key in VLLM_KEYS):
            return "vllm"
        return "megatron"


def _head(path: Path) -> bytes:
    with opened(path) as file:
        try:
            return file.read(HEAD)
        except (EOFError, zlib.error, OSError):  # the reader says where
            return b""


def _archive_format(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DataError(f"a damaged archive: {one_line(error)}") from None
    if {"step.npy", "load.npy"} <= names:
        raise DataError("is a load trace already")
    if any(name.endswith("data.pkl") for name in names):
        return "sglang"
    if any(name.endswith(".npy") for name in names):
        return "huggingface"
    raise DataError("an archive of neither PyTorch (.pt) nor NumPy (.npz)")
