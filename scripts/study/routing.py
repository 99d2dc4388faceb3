"""What a hash table has that a learned router has not: identity, stability, scale and balance, each
taken away or added alone; and the routers that are made of what is left.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Sequence

from pangu_locmoe.config import load_config
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.train.loop import Trainer
from study import verdict
from study.controls import Redraw
from study.experiment import Case, Claim, Experiment, Measured
from study.training import CONFIG, Record

WINDOW = 100  # steps at the beginning and at the end over which routing is described

VARIANTS: Dict[str, List[str]] = {
    "dense": ["model.num_moe_layers=0"],
    "hash": ["moe.router=hash"],
    "hash by position": ["moe.router=study.controls:PositionHash"],
    "hash, another table every 50 steps": ["moe.router=study.controls:RedrawnHash"],
    "hash, weight p": ["moe.router=study.controls:WeightedHash", "moe.locality_loss=0"],
    "switch": ["moe.router=switch"],
    "switch, frozen gate": ["moe.router=study.controls:FrozenGate"],
    "switch, prior 4, weight 1": ["moe.router=switch", "moe.token_prior=4.0", "moe.weight=unit"],
    "locmoe, mu 0": ["moe.router=locmoe", "moe.locality_loss=0"],
    "locmoe": ["moe.router=locmoe"],
    "locmoe, quantile": ["moe.router=locmoe", "moe.balance=quantile"],
    "locmoe, quantile, prior 2, weight 1": [
        "moe.router=locmoe",
        "moe.balance=quantile",
        "moe.token_prior=2.0",
        "moe.weight=unit",
    ],
    "two-level hash": ["moe.router=hash", "moe.levels=2"],
    "local_hash": ["moe.router=local_hash"],
    "local_hash, weight p": ["moe.router=local_hash", "moe.weight=probability"],
    "local_hash, quantile": ["moe.router=local_hash", "moe.balance=quantile"],
}
"""What each sets on top of configs/study.yaml and `moe.levels: 1`; `dense` is the dense twin."""


def cases(quick: bool) -> List[Case]:
    steps = 60 if quick else 800
    # Enough sequences for the whole validation side.
    shared = ["moe.levels=1", f"train.steps={steps}", f"evaluation.every={steps}"]
    shared.append("evaluation.sequences=" + ("16" if quick else "1000"))
    return [
        {"variant": name, "seed": seed, "config": CONFIG, "set": [*shared, *changes]}
        for seed in ((1,) if quick else (1, 2, 3))
        for name, changes in VARIANTS.items()
    ]


def measure(case: Case) -> Any:
    config = load_config(case["config"], [*case["set"], f"train.seed={case['seed']}"])
    record = Record()
    redraw = Redraw()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config, False)
        trainer = Trainer(config, prepared, Path(folder), callbacks=[record, redraw])
        redraw.model = trainer.model
        trainer.run(progress=False)
    ends = {"first": record.rows[:WINDOW], "last": record.rows[-WINDOW:]}
    keys = ("local_fraction", "dropped_fraction", "max_over_mean_load")
    routed = {
        f"{key}, {end}": statistics.mean(row[key] for row in rows)
        for end, rows in ends.items()
        for key in keys
        if rows[0].get(key) is not None
    }
    return {"validation": record.validation[-1][1], **routed}


def losses(measured: Sequence[Measured], variant: str) -> Dict[int, float]:
    """Validation loss by seed."""
    return {
        row["case"]["seed"]: row["result"]["validation"]
        for row in measured
        if row["case"]["variant"] == variant
    }


def _gap(measured: Sequence[Measured], variant: str, base: str) -> List[float]:
    """How far each seed's loss is above that of `base`, as a part of it."""
    ours, others = losses(measured, variant), losses(measured, base)
    return [ours[seed] / others[seed] - 1 for seed in sorted({*ours} & {*others})]


def claims(measured: List[Measured]) -> List[Claim]:
    """What the losses say of each property, and of the router that keeps them."""
    above = {name: _gap(measured, name, "hash") for name in VARIANTS}
    steps = [part for part in measured[0]["case"]["set"] if part.startswith("train.steps")]
    how = f"{CONFIG}, one level, {steps[0].partition('=')[2]} steps, whole validation side"
    taken = {
        "hash by position": "identity",
        "hash, another table every 50 steps": "stability",
        "hash, weight p": "full weight",
    }
    found = [
        Claim(
            f"A hash table is worth nothing without its {what}",
            "open in the papers",
            f"{name}: loss {verdict.spread(above[name], '+.1%')} above hash's; "
            f"the dense twin's: {verdict.spread(above['dense'], '+.1%')}",
            verdict.count(len(above[name]), "seed"),
            how,
            *verdict.at_least(
                [one / all_of for one, all_of in zip(above[name], above["dense"])], 0.5
            ),
        )
        for name, what in taken.items()
    ]
    learned = ("switch", "locmoe, mu 0")
    found.append(
        Claim(
            "Learned top-1 routing is worth more than a dense layer",
            "lower loss than the dense model's (Switch, LocMoE)",
            "; ".join(
                f"{name}: {verdict.spread(_gap(measured, name, 'dense'), '+.1%')} against the "
                "dense twin"
                for name in learned
            ),
            verdict.count(len(above["switch"]), "seed"),
            how,
            *verdict.positive(
                [-gap for name in learned for gap in _gap(measured, name, "dense")],
                "the loss is lower",
            ),
        )
    )
    found.append(
        Claim(
            "The node by LocMoE's gate and the expert by a table keeps hash's loss",
            "not in the papers",
            f"local_hash: {verdict.spread(above['local_hash'], '+.1%')} against hash; two-level "
            f"hash by label: {verdict.spread(above['two-level hash'], '+.1%')}; "
            f"{_routed(measured, 'local_hash', 'local_fraction, last')} of its tokens local",
            verdict.count(len(above["local_hash"]), "seed"),
            how,
            *verdict.at_most(above["local_hash"], 0.01, 0.03),
        )
    )
    ratio = [
        row["result"]["max_over_mean_load, last"]
        for row in measured
        if row["case"]["variant"] == "locmoe, quantile"
    ]
    found.append(
        Claim(
            "LocMoE's load is even",
            "balanced by its losses",
            f"max/mean {_routed(measured, 'locmoe', 'max_over_mean_load, last', '.2f')} with the "
            f"balance loss, {verdict.spread(ratio, '.2f')} with moe.balance: quantile; dropped "
            f"{_routed(measured, 'locmoe', 'dropped_fraction, first', '.1%')} and "
            f"{_routed(measured, 'locmoe, quantile', 'dropped_fraction, first', '.1%')} in the "
            f"first {WINDOW} steps",
            verdict.count(len(ratio), "seed"),
            how,
            *verdict.at_most([one - 1 for one in ratio], 0.25, 0.5),
        )
    )
    return [claim for claim in found if claim.seeds != "0 seeds"]


def _routed(measured: Sequence[Measured], variant: str, key: str, form: str = ".0%") -> str:
    values = [row["result"][key] for row in measured if row["case"]["variant"] == variant]
    return verdict.spread(values, form)


def table(measured: List[Measured]) -> str:
    """All variants, as Markdown."""
    lines = [
        "| routing | validation loss | above hash | local | dropped, first / last "
        f"{WINDOW} steps | max/mean, first / last |",
        "|---|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        rows = [row["result"] for row in measured if row["case"]["variant"] == name]
        if not rows:
            continue
        cells = [name, verdict.spread([row["validation"] for row in rows])]
        cells.append(verdict.spread(_gap(measured, name, "hash"), "+.1%"))
        if "local_fraction, last" not in rows[0]:
            lines.append("| " + " | ".join([*cells, "", "", ""]) + " |")
            continue
        cells.append(_routed(measured, name, "local_fraction, last"))
        for key, form in (("dropped_fraction", ".1%"), ("max_over_mean_load", ".2f")):
            ends = (_routed(measured, name, f"{key}, {end}", form) for end in ("first", "last"))
            cells.append(" / ".join(ends))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


EXPERIMENT = Experiment(
    "routing",
    cases,
    measure,
    claims,
    caption="What a hash table has and learned routing has not, one property at a time",
    table=table,
)
