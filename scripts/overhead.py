"""Where the wall time of runs went, `python scripts/overhead.py RUN...`, at the end of kill_test.sh;
needs Python only. Each RUN is finished: it has a summary.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

PARTS = (
    "prepare",
    "compile",
    "steps",
    "evaluation",
    "checkpoints",
    "lost",
    "restarts",
    "down",
    "other",
)


def line(name: str, time: Dict[str, Any]) -> str:
    """One run in one line."""
    parts = ", ".join(f"{part} {time[part]:.1f}" for part in PARTS)
    return (
        f"{name}: {time['observed']:.1f} s in {time['starts']} starts: {parts}; "
        f"{time['steps_done_twice']} steps done twice; "
        f"training overhead ratio {time['training_overhead_ratio']:.3f}"
    )


def main(arguments: Optional[List[str]] = None) -> int:
    for run in map(Path, sys.argv[1:] if arguments is None else arguments):
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        print(line(run.name, summary["wall_time"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
