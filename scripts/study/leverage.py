"""How far a table inside the node carries: with the experts that a node has, and late in a run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Dict, List, Sequence

from pangu_locmoe.config import load_config
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.train.loop import Trainer
from study import verdict
from study.experiment import Case, Claim, Experiment, Measured
from study.routing import VARIANTS
from study.training import CONFIG, Record

NODES = 2  # of configs/study.yaml
EXPERTS_PER_NODE = (1, 2, 4, 8)
COMPARED = (
    "hash",
    "local_hash",
    "locmoe",
    "locmoe, quantile, prior 2, weight 1",
)
LATE_STEPS = 6000


def experts_cases(quick: bool) -> List[Case]:
    steps = 60 if quick else 800
    shared = ["moe.levels=1", f"train.steps={steps}", f"evaluation.every={steps}"]
    shared.append("evaluation.sequences=" + ("16" if quick else "1000"))
    return [
        {
            "variant": name,
            "experts_per_node": each,
            "seed": 1,
            "config": CONFIG,
            "set": [*shared, f"moe.num_experts={NODES * each}", *VARIANTS[name]],
        }
        for each in EXPERTS_PER_NODE
        for name in COMPARED
    ]


def late_cases(quick: bool) -> List[Case]:
    steps = 120 if quick else LATE_STEPS
    shared = ["moe.levels=1", f"train.steps={steps}", f"evaluation.every={steps // 6}"]
    shared += ["evaluation.sequences=" + ("16" if quick else "300")]
    shared += ["data.max_bytes_per_domain=3000000"]
    return [
        {"variant": name, "seed": 1, "config": CONFIG, "set": [*shared, *VARIANTS[name]]}
        for name in (*COMPARED, "switch")
    ]


def measure(case: Case) -> Any:
    """Validation losses, and how the last 100 steps were routed."""
    config = load_config(case["config"], [*case["set"], f"train.seed={case['seed']}"])
    record = Record()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, prepare(config, False), Path(folder), callbacks=[record])
        trainer.run(progress=False)
    rows = record.rows[-100:]
    keys = ("local_fraction", "dropped_fraction", "max_over_mean_load")
    return {
        "validation": record.validation,
        **{key: sum(row[key] for row in rows) / len(rows) for key in keys},
    }


def _by(measured: Sequence[Measured], *keys: str) -> Dict[Any, Any]:
    return {tuple(row["case"][key] for key in keys): row["result"] for row in measured}


def experts_claims(measured: List[Measured]) -> List[Claim]:
    found = _by(measured, "variant", "experts_per_node")
    gaps = {
        each: _last(found[("local_hash", each)]) / _last(found[("hash", each)]) - 1
        for each in EXPERTS_PER_NODE
        if ("local_hash", each) in found and ("hash", each) in found
    }
    if len(gaps) < 2:
        return []
    first, last = gaps[min(gaps)], gaps[max(gaps)]
    return [
        Claim(
            "A table inside the node is worth more the more experts the node has",
            "not in the papers, which have one",
            "local_hash above hash: "
            + "; ".join(
                f"{gap:+.1%} with {verdict.count(each, 'expert')} a node"
                for each, gap in gaps.items()
            ),
            "1 seed",
            f"{CONFIG}, {NODES} nodes, one level",
            *verdict.positive([first - last], "the gap is smaller with the most than with one"),
        )
    ]


def _last(result: Any) -> float:
    """The last validation loss."""
    return float(result["validation"][-1][1])


def experts_table(measured: List[Measured]) -> str:
    found = _by(measured, "variant", "experts_per_node")
    lines = [
        "| validation loss (above hash; local) | "
        + " | ".join(verdict.count(each, "expert") + " a node" for each in EXPERTS_PER_NODE)
        + " |",
        "|---" * (len(EXPERTS_PER_NODE) + 1) + "|",
    ]
    for name in COMPARED:
        cells = [name]
        for each in EXPERTS_PER_NODE:
            ours, base = found.get((name, each)), found.get(("hash", each))
            if ours is None or base is None:
                cells.append("–")
                continue
            loss, other = ours["validation"][-1][1], base["validation"][-1][1]
            cells.append(f"{loss:.3f} ({loss / other - 1:+.1%}; {ours['local_fraction']:.0%})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def late_table(measured: List[Measured]) -> str:
    found = _by(measured, "variant")
    steps = sorted({step for result in found.values() for step, _ in result["validation"]})
    lines = [
        "| validation loss (above hash) | "
        + " | ".join(f"{step:,} steps" for step in steps)
        + " | local, dropped, max/mean at the end |",
        "|---" * (len(steps) + 2) + "|",
    ]
    base = dict(found[("hash",)]["validation"]) if ("hash",) in found else {}
    for (name,), result in found.items():
        losses = dict(result["validation"])
        cells = [name]
        for step in steps:
            above = f" ({losses[step] / base[step] - 1:+.1%})" if step in base else ""
            cells.append(f"{losses[step]:.3f}{above}" if step in losses else "–")
        cells.append(
            f"{result['local_fraction']:.0%}, {result['dropped_fraction']:.1%}, "
            f"{result['max_over_mean_load']:.2f}"
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def late_claims(measured: List[Measured]) -> List[Claim]:
    found = _by(measured, "variant")
    if not {("hash",), ("local_hash",)} <= set(found):
        return []
    base, ours = (dict(found[(name,)]["validation"]) for name in ("hash", "local_hash"))
    steps = sorted({*base} & {*ours})
    gaps = [ours[step] / base[step] - 1 for step in steps]
    return [
        Claim(
            "local_hash comes closer to hash as a run gets longer",
            "not in the papers",
            "; ".join(f"{gap:+.1%} after {step:,}" for step, gap in zip(steps, gaps)),
            "1 seed",
            f"{CONFIG}, one level, 3 MB a domain, {steps[-1]:,} steps",
            *verdict.at_most(gaps[-1:], min(gaps[0], 0.01), gaps[0]),
        )
    ]


EXPERTS = Experiment(
    "experts_per_node",
    experts_cases,
    measure,
    experts_claims,
    caption="Validation loss with as much arithmetic for a token and more experts on each node",
    table=experts_table,
)
LATE = Experiment(
    "late",
    late_cases,
    measure,
    late_claims,
    caption="Validation loss along longer runs",
    table=late_table,
)
