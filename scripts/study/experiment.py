"""What an experiment is: cases that are measured one by one, and claims that are judged from all of
them.

Raw numbers are one JSON file for each experiment, written anew after every case, so that an
experiment goes on where it was stopped. A case is a plain dict that holds all of its settings: one
that is in the file as it stands is not measured again.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from pangu_locmoe.files import json_text, write_atomic

Case = Dict[str, Any]
Measured = Dict[str, Any]
"""`case`, `result`, `date` (ISO), `seconds`"""


@dataclass(frozen=True)
class Claim:
    """A row of the table; `verdict` and `rule` come from verdict.py."""

    claim: str
    paper: str
    ours: str
    seeds: str
    how: str
    verdict: str
    rule: str


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: of its file, and what `--again` takes.
        cases: all settings to measure; the argument is whether the quick version is wanted.
        measure: a case's result, JSON-able. Runs in a process of its own.
        claims: rows of the table; never called without measured cases.
        picture: draws NAME.svg; None: there is none.
        caption: of the picture.
        table: all results as a Markdown table, for under the picture; None: the claims say it all.
    """

    name: str
    cases: Callable[[bool], List[Case]]
    measure: Callable[[Case], Any]
    claims: Callable[[List[Measured]], List[Claim]]
    picture: Optional[Callable[[List[Measured], Path], None]] = None
    caption: str = ""
    table: Optional[Callable[[List[Measured]], str]] = None


def read_measured(file: Path) -> List[Measured]:
    """What a file of raw numbers holds; nothing where there is none."""
    if not file.exists():
        return []
    measured: List[Measured] = json.loads(file.read_text(encoding="utf-8"))["measured"]
    return measured


def still_to_measure(experiment: Experiment, file: Path, quick: bool) -> List[Case]:
    """The cases that are not in the file with the same settings."""
    done = [row["case"] for row in read_measured(file)]
    return [case for case in experiment.cases(quick) if case not in done]


def record(
    experiment: Experiment, file: Path, quick: bool, case: Case, result: Any, seconds: float
) -> None:
    """Add a case's result; cases that the experiment no longer has are taken out."""
    row = {
        "case": case,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "result": result,
    }
    order = experiment.cases(quick)
    kept = [old for old in read_measured(file) if old["case"] in order and old["case"] != case]
    rows = sorted([*kept, row], key=lambda row: order.index(row["case"]))
    content = {
        "experiment": experiment.name,
        "quick": quick,
        "machine": machine(),
        "measured": rows,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json_text(content, indent=1) + "\n").encode("utf-8"))


def machine() -> str:
    """Processor and cores, for the page."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"
