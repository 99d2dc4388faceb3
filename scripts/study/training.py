"""Short runs of every router side by side: perplexity early and late, unused experts, alikeness
of an expert's tokens.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from pangu_locmoe.config import Config, load_config
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.moe.routers import ROUTERS
from pangu_locmoe.train.callbacks import Callback, Row
from pangu_locmoe.train.loop import Trainer
from pangu_locmoe.train.step import StepResult
from study import tokens, verdict
from study.documents import loss_table
from study.experiment import Case, Claim, Experiment, Measured

CONFIG = "configs/study.yaml"
WINDOW = 50  # steps over which an expert is called unused


class Record(Callback):
    """Keeps all rows, and each step's counts."""

    def __init__(self) -> None:
        self.rows: List[Row] = []
        self.validation: List[Tuple[int, float]] = []
        self.load: List[np.ndarray] = []

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        self.rows.append(row)
        self.load.append(result.load_LNE.sum(axis=1))

    def on_row(self, row: Row) -> None:
        if "validation_loss" in row:
            self.validation.append((row["step"], row["validation_loss"]))


def configured(case: Case) -> Config:
    """A case's `config` with its `set`, and its router and seed."""
    return load_config(
        case["config"], [*case["set"], f"moe.router={case['router']}", f"train.seed={case['seed']}"]
    )


def trained(case: Case, record: Callback) -> Trainer:
    """The case's run. What it writes is thrown away."""
    config = configured(case)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, prepare(config, False), Path(folder), callbacks=[record])
        trainer.run(progress=False)
    return trainer


def routers() -> List[str]:
    """The package's own, those of the papers first."""
    return sorted(
        (name for name in ROUTERS if ":" not in name),
        key=lambda name: (not ("hash", "switch", "locmoe").count(name), name),
    )


def cases(quick: bool) -> List[Case]:
    changes = (
        ["train.steps=150", "evaluation.every=50"]
        if quick
        else ["train.steps=1500", "evaluation.every=150"]
    )
    return [
        {"router": router, "seed": seed, "config": CONFIG, "set": changes}
        for seed in ((1,) if quick else (1, 2, 3))
        for router in routers()
    ]


def measure(case: Case) -> Any:
    record = Record()
    trainer = trained(case, record)
    load_WLE = np.stack(record.load)
    gates = [
        block.moe.router.w_ED.asnumpy()
        for block in trainer.model.blocks
        if hasattr(getattr(getattr(block, "moe", None), "router", None), "w_ED")
    ]
    return {
        "validation": record.validation,
        "blocks": trainer.evaluator.blocks,
        "unused": [
            [end, tokens.unused_fraction(load_WLE[end - WINDOW : end])]
            for end in range(WINDOW, len(load_WLE) + 1, WINDOW)
        ],
        "max_over_mean_load": statistics.mean(
            row["max_over_mean_load"] for row in record.rows[len(record.rows) // 2 :]
        ),
        "cosines": tokens.similarities(trainer.model, trainer.config, trainer.prepared, 16),
        "gate_cosine": statistics.mean(map(tokens.mean_gate_cosine, gates)) if gates else None,
    }


def by_seed(measured: List[Measured], router: str) -> Dict[int, Any]:
    return {
        row["case"]["seed"]: row["result"] for row in measured if row["case"]["router"] == router
    }


def claims(measured: List[Measured]) -> List[Claim]:
    base, switch, locmoe = (by_seed(measured, router) for router in ("hash", "switch", "locmoe"))
    seeds = sorted({*base} & {*switch} & {*locmoe})
    if not seeds:
        return []
    steps = measured[0]["result"]["validation"][-1][0]
    how = f"{CONFIG}, {steps} steps"
    return [
        *_perplexity(base, switch, locmoe, seeds, how),
        _unused(switch, locmoe, seeds, how),
        *_alike(locmoe, switch, seeds, how),
    ]


def _perplexity(
    base: Dict[int, Any], switch: Dict[int, Any], locmoe: Dict[int, Any], seeds: List[int], how: str
) -> List[Claim]:
    def perplexity(results: Dict[int, Any], index: int) -> List[float]:
        return [math.exp(results[seed]["validation"][index][1]) for seed in seeds]

    early, late = (
        [perplexity(results, index) for results in (base, switch, locmoe)] for index in (0, -1)
    )
    between = [min(h, s) < ours < max(h, s) for h, s, ours in zip(*early)]
    apart = [max(abs(ours / h - 1), abs(ours / s - 1)) for h, s, ours in zip(*late)]
    first = base[seeds[0]]["validation"][0][0]

    def told(values: List[List[float]]) -> str:
        return "; ".join(
            f"{name} {verdict.spread(value, '.1f')}"
            for name, value in zip(("hash", "switch", "locmoe"), values)
        )

    return [
        Claim(
            f"Early perplexity is between hash's and switch's (step {first})",
            "between",
            told(early),
            verdict.count(len(seeds), "seed"),
            how,
            *verdict.all_of(between, "it is between in every seed"),
        ),
        Claim(
            "Late perplexity is the same",
            "the same",
            told(late),
            verdict.count(len(seeds), "seed"),
            how,
            *verdict.at_most(apart, 0.02, 0.05),
        ),
    ]


def _unused(switch: Dict[int, Any], locmoe: Dict[int, Any], seeds: List[int], how: str) -> Claim:
    def ends(results: Dict[int, Any], index: int) -> List[float]:
        return [results[seed]["unused"][index][1] for seed in seeds]

    last_switch = ends(switch, -1)
    last_locmoe = ends(locmoe, -1)
    first_switch = ends(switch, 0)
    first_locmoe = ends(locmoe, 0)
    ours = (
        f"first {WINDOW} steps: switch {verdict.spread(first_switch, '.0%')}, locmoe "
        f"{verdict.spread(first_locmoe, '.0%')}; "
        f"last {WINDOW}: switch {verdict.spread(last_switch, '.0%')}, locmoe "
        f"{verdict.spread(last_locmoe, '.0%')}"
    )
    more = [one - other for one, other in zip(last_switch, last_locmoe)]
    claim = "Switch leaves 40% of its experts nearly unused, LocMoE is even"
    return Claim(
        claim,
        "about 40%; even",
        f"under {tokens.HARDLY:.0%} of an even share, {ours}",
        verdict.count(len(seeds), "seed"),
        how,
        *verdict.at_least(more, 0.3, ".0%"),
    )


def _alike(
    locmoe: Dict[int, Any], switch: Dict[int, Any], seeds: List[int], how: str
) -> List[Claim]:
    pairs = [tuple(layer) for seed in seeds for layer in locmoe[seed]["cosines"]]
    gaps = [within - across for within, across in pairs]
    dense = [switch[seed]["gate_cosine"] for seed in seeds]
    ours = (
        f"{verdict.spread([w for w, _ in pairs], '.2f')} inside an expert, "
        f"{verdict.spread([a for _, a in pairs], '.2f')} between experts"
    )
    return [
        Claim(
            "Tokens of an expert are alike, tokens of different experts are not",
            "alike",
            f"mean cosine {ours}",
            f"{verdict.count(len(seeds), 'seed')} x {len(pairs) // len(seeds)} layers",
            f"{how}, on validation text",
            *verdict.positive(gaps, "the mean cosine is higher inside than between experts"),
        ),
        Claim(
            "A learned gate's vectors are not orthogonal, GrAP's are",
            "GrAP's are",
            f"mean absolute cosine of two of switch's {verdict.spread(dense, '.2f')}; GrAP's 0",
            verdict.count(len(seeds), "seed"),
            how,
            *verdict.positive([value - 0.01 for value in dense], "switch's is above 0.01"),
        ),
    ]


def table(measured: List[Measured]) -> str:
    """Final losses, and the gaps between routers, with their spread over seeds and over
    documents.
    """
    models: Dict[str, Any] = {}
    for row in measured:
        result = row["result"]
        run = {
            "seed": row["case"]["seed"],
            "loss": result["validation"][-1][1],
            "blocks": result.get("blocks"),
        }
        models.setdefault(row["case"]["router"], []).append(run)
    return loss_table(models, next(iter(models)))


def draw(measured: List[Measured], path: Path) -> None:
    """Validation loss, and the share of unused experts, over the steps."""
    from study import charts

    lines = charts.Lines(2)
    for row in measured:
        router = row["case"]["router"]
        for panel, name in enumerate(("validation", "unused")):
            steps, values = zip(*row["result"][name])
            lines.add(panel, router, steps, values)
    lines.save(
        path,
        [
            ("steps", "validation loss"),
            ("steps", f"share of experts under {tokens.HARDLY:.0%} of an even share"),
        ],
    )


EXPERIMENT = Experiment(
    "training",
    cases,
    measure,
    claims,
    draw,
    "Validation loss and unused experts, every router, a line for each seed",
    table,
)
