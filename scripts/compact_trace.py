"""A run's load trace as a smaller file: `python scripts/compact_trace.py TRACE FILE.npz`, called by
record_traces.sh.

The counts of a step fit into 16 bits, which compress to less than the 32 of a run's own file.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import List, Optional

import numpy as np

from pangu_locmoe.errors import DataError, LocMoEError
from pangu_locmoe.expert_load.trace import read_trace
from pangu_locmoe.files import write_atomic

MOST = np.iinfo(np.uint16).max


def compact(path: Path, output: Path) -> int:
    """Write a trace again, with counts of 16 bits. Returns its rows.

    Args:
        path: what a run or `load import` wrote.
        output: an .npz file, whole or not there.

    Raises:
        LocMoEError: the trace cannot be read, or an expert has more tokens than 16 bits hold.
    """
    trace = read_trace(path)
    counts = {
        "load": trace.load_WLE,
        "source": trace.source_WLNE,
        "dropped": trace.dropped_WLE,
    }
    known = {name: count for name, count in counts.items() if count is not None}
    largest = max(int(count.max()) for count in known.values())
    if largest > MOST:
        raise DataError(f"{path}: an expert has {largest} tokens in a step: more than 16 bits hold")
    small = {name: count.astype(np.uint16) for name, count in known.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, step=trace.step_W, **small)
    write_atomic(output, buffer.getvalue())
    return len(trace.step_W)


def main(arguments: Optional[List[str]] = None) -> int:
    path, output = map(Path, sys.argv[1:] if arguments is None else arguments)
    try:
        count = compact(path, output)
    except LocMoEError as error:
        print(f"record_traces.sh: {error}", file=sys.stderr)
        return 1
    print(f"{output}: {count} rows, {output.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
