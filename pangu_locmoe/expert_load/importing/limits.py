"""What an import takes at most, what it is told beside the files, and how it names what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pangu_locmoe.errors import DataError

# of an expert, a layer or a rank. Beyond it is a mistake, and the table of counts would be huge
LARGEST_INDEX = 65_535
LARGEST_TRACE = 2**31  # counts in the trace, 8 GB as int32
LARGEST_TABLE = 2**24  # counts of one step and layer: 256 nodes of 65,536 experts
LARGEST_LINE = 2**28  # bytes, also of a JSON file that is read whole
LARGEST_ARRAYS = 2**33  # bytes of all arrays of an .npz, unpacked


@dataclass(frozen=True)
class Options:
    """What the command line says beside the files.

    Attributes:
        num_experts: of each layer; None: what the file says, or its largest index + 1.
        ranks_per_node: consecutive ranks that are one node.
        top_k: experts of a token, where a file has scores alone.
        expert_map: where experts were, for counts by slot in a file that does not say.
    """

    num_experts: int | None = None
    ranks_per_node: int = 1
    top_k: int | None = None
    expert_map: Path | None = None


class LineError(Exception):
    """A line of a text file that cannot be read."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(f"line {line}: {text}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors within become a DataError of one line that begins with the file."""
    try:
        yield
    except LineError as error:
        raise DataError(f"{path}, {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
