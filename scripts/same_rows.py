"""Have two runs the same metrics? `python scripts/same_rows.py RUN OTHER`, at the end of
kill_test.sh; needs Python only. Exit code 1: a row is missing, or differs in more than time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional


def rows(run: Path) -> List[Dict[str, Any]]:
    """The rows of a run's metrics.jsonl without what a clock said."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if "second" not in key}
        for line in lines
    ]


def difference(run: Path, other: Path) -> Optional[str]:
    """What is not the same, in one line; None: nothing."""
    ours, theirs = rows(run), rows(other)
    steps = [one["step"] for one, two in zip(ours, theirs) if one != two]
    if not steps and len(ours) == len(theirs):
        return None
    return f"{len(theirs)} rows, not {len(ours)}; steps that differ: {steps[:10]}"


def main(arguments: Optional[List[str]] = None) -> int:
    run, other = map(Path, sys.argv[1:] if arguments is None else arguments)
    found = difference(run, other)
    if found is not None:
        print(f"{other}: {found}", file=sys.stderr)
        return 1
    print(f"all {len(rows(run))} rows are those of the undisturbed run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
