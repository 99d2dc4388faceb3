"""Two spreads of a validation loss: over the seeds, which have the same documents, and over
documents (intervals.py).
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence

from pangu_locmoe.train.intervals import Blocks, difference, interval, mean_of
from study import verdict

UNKNOWN = "not recorded"

Runs = List[Dict[str, Any]]
"""of one model, one for each seed: `seed`, `loss`, and `blocks` where the version that measured
it recorded them
"""


def loss_table(models: Dict[str, Runs], base: str) -> str:
    """A Markdown table of losses, and of what they are above the base's in the same seed, each with
    both spreads.

    Args:
        models: runs by name.
        base: the name that the others are compared with.
    """
    head = [
        "router",
        "validation loss [seeds]",
        "on other documents, 95%",
        f"above {base}'s [seeds]",
        "on other documents, 95%",
    ]
    lines = [head, ["---"] * len(head)]
    for name, runs in models.items():
        others = {run["seed"]: run for run in models[base]}
        pairs = [(run, others[run["seed"]]) for run in runs if run["seed"] in others]
        gaps = [run["loss"] - other["loss"] for run, other in pairs]
        apart = on_other_documents(
            [run.get("blocks") for run, _ in pairs],
            "+.3f",
            [other.get("blocks") for _, other in pairs],
        )
        own = [
            name,
            verdict.spread([run["loss"] for run in runs]),
            on_other_documents([run.get("blocks") for run in runs]),
        ]
        lines.append(
            [*own, *(["–", "–"] if name == base else [verdict.spread(gaps, "+.3f"), apart])]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def note(name: str, results: Sequence[Any]) -> str:
    """What the page says of an experiment whose losses were measured without blocks of
    documents; nothing of others.
    """
    if not any(
        isinstance(result, dict) and "validation" in result and "blocks" not in result
        for result in results
    ):
        return ""
    return (
        f"The losses of `{name}` are older than intervals from blocks of documents, and of "
        "the first sequences of each domain "
        f"instead of a sample spread over it; `bash scripts/reproduce.sh --again {name}` "
        "measures them anew."
    )


def on_other_documents(
    runs: Sequence[Optional[Blocks]], form: str = ".3f", less: Sequence[Optional[Blocks]] = ()
) -> str:
    """Where 95% of other documents would have the mean loss of these runs, less that of others;
    or why nobody knows.
    """
    known, others = ([blocks for blocks in each if blocks is not None] for each in (runs, less))
    if not known or len(known) < len(runs) or len(others) < len(less):
        return UNKNOWN
    try:
        mean = difference(mean_of(known), mean_of(others)) if others else mean_of(known)
    except ValueError:
        return "measured on different text"
    ends = interval(mean)
    return "one document in a domain" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"
