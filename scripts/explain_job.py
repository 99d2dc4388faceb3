"""Says in one line why a job of several processes failed, from its logs: python
scripts/explain_job.py RUN_DIR/logs
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import Optional

NOISE = ("[WARNING]", "[INFO]", "[ERROR]", "[CRITICAL]")


def explain(logs: Path) -> Optional[str]:
    """The rank that died, or the error a rank printed, or the ranks that never started; None
    where nothing is known.
    """
    said = {int(file.stem.split("_")[1]): _read(file) for file in logs.glob("worker_*.log")}
    ranks = {
        int(pid): rank
        for rank, text in said.items()
        for pid in re.findall(r"^\[INFO\] rank \d+ is process (\d+)$", text, re.MULTILINE)
    }
    died = [
        (ranks.get(int(pid)), int(code))
        for file in sorted(logs.glob("msrun*.log"))
        for pid, code in re.findall(
            r"Worker process (\d+) exit with exception. Error code: (-?\d+)", _read(file)
        )
    ]
    for rank, code in died:
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; was it short of memory?" if name == "SIGKILL" else ""
            return f"{_name(rank)} was ended by {name}{hint}"
    errors = {
        rank: re.findall(r"^pangu-locmoe: (.*)$", text, re.MULTILINE)
        for rank, text in sorted(said.items())
    }
    silent = sorted(set(said) - set(ranks.values()))
    if silent and any("cannot join" in line for lines in errors.values() for line in lines):
        return (
            f"{', '.join(map(_name, silent))} did not start: {logs}/worker_{silent[0]}.log may "
            "say why"
        )
    for lines in errors.values():
        if lines:
            return lines[0]
    for rank, code in died:
        lines = [
            line
            for line in said.get(-1 if rank is None else rank, "").splitlines()
            if line.strip() and not line.startswith(NOISE)
        ]
        return f"{_name(rank)} failed with exit code {code}" + (f": {lines[-1]}" if lines else "")
    return None


def _name(rank: Optional[int]) -> str:
    return "a rank" if rank is None else f"rank {rank}"


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    line = explain(Path(sys.argv[1]))
    if line is not None:
        print(line)
