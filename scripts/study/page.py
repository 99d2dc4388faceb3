"""docs/results.md: the table of claims, the rules of the verdicts, and the pictures."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import List, Sequence, Union

from pangu_locmoe.files import write_atomic
from study import (
    capacity,
    documents,
    gates,
    leverage,
    load,
    recorded,
    routing,
    training,
    verdict,
)
from study.experiment import Claim, Experiment, read_measured
from study.recorded import Recorded

ALL: List[Union[Experiment, Recorded]] = [
    recorded.COMPARISON,
    routing.EXPERIMENT,
    leverage.EXPERTS,
    leverage.LATE,
    training.EXPERIMENT,
    gates.EXPERIMENT,
    capacity.EXPERIMENT,
    load.STATES,
    load.FORECASTS,
    recorded.PLACEMENT,
]
"""in the order of the page"""

HEAD = """# The papers' claims, measured here

Made by `bash scripts/reproduce.sh{flag}`; do not edit. One row for each claim of LocMoE (arXiv 2401.13920), expert-load prediction
(2404.16914) and LocMoE+ (2406.00023). A verdict is computed from the raw numbers in {where} by the rule of its number
below; it is about this code on small models and CPUs, not about the papers' systems.
"""
QUICK = (
    "\n**Quick settings**: far fewer steps, seeds and sizes than the full run. Verdicts show "
    "that everything works, and no more.\n"
)


def write_page(file: Path, raw: Path, committed: Path, quick: bool) -> None:
    """Write the page and its pictures.

    Args:
        file: the page.
        raw: folder of the experiments' raw numbers and pictures.
        committed: folder of the numbers that other scripts record.
        quick: whether these are quick results.
    """
    rows = []
    rules = []
    notes = []
    pictures = []
    machines = set()
    for one in ALL:
        if isinstance(one, Recorded):
            found = (
                one.claims(committed)
                if all((committed / name).exists() for name in one.files)
                else []
            )
            when = one.date(committed) if found else ""
            picture = committed / f"{one.name}.svg"
            table = ""
        else:
            measured = read_measured(raw / f"{one.name}.json")
            if measured:
                machines.add(
                    json.loads((raw / f"{one.name}.json").read_text(encoding="utf-8"))["machine"]
                )
            found = one.claims(measured) if measured else []
            when = max((row["date"] for row in measured), default="")
            picture = raw / f"{one.name}.svg"
            if measured and one.picture is not None:
                one.picture(measured, picture)
            table = one.table(measured) if measured and one.table is not None else ""
            missing = len(one.cases(quick)) - len(measured)
            older = documents.note(one.name, [row["result"] for row in measured])
            notes += [older] if older else []
            if measured and missing > 0:
                notes.append(
                    f"`{one.name}` lacks {missing} of its {len(one.cases(quick))} cases: "
                    "its rows are preliminary."
                )
        if not found:
            notes.append(f"`{one.name}` has not been run.")
        for claim in found:
            rules.append(claim.rule)
            rows.append(_row(claim, when, len(rules)))
        if found and picture.exists():
            pictures.append(
                f"![{one.caption}]({_relative(picture, file.parent)})\n\n{one.caption}."
                + f"\n\n{table}" * bool(table)
            )
        elif table:
            pictures.append(f"{one.caption}.\n\n{table}")
    if machines:
        notes.append(
            f"Measured on {'; '.join(sorted(machines))}, where a row names no other machine."
        )
    count = Counter(row[-2] for row in rows)
    head = HEAD.format(
        flag=" --quick" if quick else "", where="this folder" if quick else "`docs/results/*.json`"
    )
    parts = [
        head,
        QUICK if quick else "",
        _count(count),
        "\n".join(f"- {note}" for note in notes),
        _table(rows),
        "## Rules\n",
        "\n".join(f"{i}. {rule}" for i, rule in enumerate(rules, 1)),
        *(["\n## Pictures and tables\n"] if pictures else []),
        "\n\n".join(pictures),
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, ("\n".join(part for part in parts if part).rstrip() + "\n").encode("utf-8"))


def _row(claim: Claim, when: str, number: int) -> List[str]:
    return [
        claim.claim,
        claim.paper,
        claim.ours,
        claim.seeds,
        f"{claim.how}; {when}",
        claim.verdict,
        str(number),
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = [
        "claim",
        "paper",
        "ours [lowest, highest]",
        "seeds",
        "how and when measured",
        "verdict",
        "rule",
    ]
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    return "\n".join(["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines, ""])


def _count(count: Counter[str]) -> str:
    plural = {
        verdict.HOLDS: "hold",
        verdict.PARTLY: "hold partly",
        verdict.NOT: "do not hold here",
        verdict.CANNOT: "cannot be tested here",
    }
    return ", ".join(f"{count[name]} {text}" for name, text in plural.items()) + ".\n"


def _relative(path: Path, start: Path) -> str:
    return os.path.relpath(path, start)  # pathlib has no way up
