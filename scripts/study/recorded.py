"""What longer scripts have measured: their committed raw numbers, and the claims judged from them.

`scripts/reproduce.sh --again NAME` calls the script; else its numbers are taken as they are.
"""

from __future__ import annotations

import json
import math
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

from study import verdict
from study.experiment import Claim

Row = Dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """Raw numbers that a script of its own writes.

    Attributes:
        name: what `--again` takes.
        command: writes `files`, and takes hours.
        files: of docs/results; the picture NAME.svg is the script's too.
        claims: from the folder of the files.
        caption: of the picture.
    """

    name: str
    command: Tuple[str, ...]
    files: Tuple[str, ...]
    claims: Callable[[Path], List[Claim]]
    caption: str

    def date(self, folder: Path) -> str:
        """The day of the commit that brought the numbers, or of the file."""
        file = folder / self.files[0]
        done = subprocess.run(
            ["git", "log", "-1", "--format=%cs", "--", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() or time.strftime(
            "%Y-%m-%d", time.localtime(file.stat().st_mtime)
        )


def comparison_claims(folder: Path) -> List[Claim]:
    rows: List[Row] = json.loads((folder / "compare_routers.json").read_text(encoding="utf-8"))
    rows = [
        row for row in rows if row["link_rate"] == rows[-1]["link_rate"]
    ]  # the slowest links: the exchange's largest share
    curves = json.loads((folder / "compare_losses.json").read_text(encoding="utf-8"))
    base, switch, ours = (_by_seed(rows, router) for router in ("hash", "switch", "locmoe"))
    seeds = sorted({*base} & {*switch} & {*ours})
    first = rows[0]
    how = (
        "scripts/compare_routers.sh: emulated cluster of 2 nodes x 2 ranks, links of "
        f"{first['link_rate']}, {first['steps']} steps, {first['timed_steps']} timed"
    )

    def less(other: Dict[int, Row], key: str) -> List[float]:
        return [1 - ours[seed][key] / other[seed][key] for seed in seeds]

    def claim(text: str, paper: str, values: List[float], target: float) -> Claim:
        return Claim(
            text,
            paper,
            f"{verdict.spread([-value for value in values], '+.1%')}",
            verdict.count(len(seeds), "seed"),
            how,
            *verdict.at_least(values, target),
        )

    return [
        claim("Time per epoch against hash", "-12.68%", less(base, "step_seconds"), 0.1268),
        claim("Time per epoch against switch", "-22.24%", less(switch, "step_seconds"), 0.2224),
        claim("All-to-All time against hash", "-5.13%", less(base, "exchange_seconds"), 0.0513),
        _even(ours, switch, seeds, how),
        _early(curves, seeds, how),
    ]


def _even(ours: Dict[int, Row], switch: Dict[int, Row], seeds: List[int], how: str) -> Claim:
    told = [
        f"{name} {verdict.spread([rows[seed]['max_over_mean_load'] for seed in seeds], '.2f')}"
        for name, rows in (("locmoe", ours), ("switch", switch))
    ]
    conditions = [
        max(ours[seed]["max_over_mean_load"] for seed in seeds) <= 1.25,
        all(ours[s]["max_over_mean_load"] < switch[s]["max_over_mean_load"] for s in seeds),
    ]
    rule = (
        "locmoe's fullest expert is at most 1.25 times the mean, and below switch's, in every seed"
    )
    return Claim(
        "LocMoE's load is even",
        "even",
        f"fullest expert over mean, second half: {', '.join(told)}",
        verdict.count(len(seeds), "seed"),
        how,
        *verdict.all_of(conditions, rule),
    )


def _early(curves: Dict[str, Any], seeds: List[int], how: str) -> Claim:
    early = [
        [math.exp(curves[f"{router}-1-domain-seed{seed}"]["validation"][0][1]) for seed in seeds]
        for router in ("hash", "switch", "locmoe")
    ]
    step = curves[f"hash-1-domain-seed{seeds[0]}"]["validation"][0][0]
    between = [min(h, s) < own < max(h, s) for h, s, own in zip(*early)]
    told = "; ".join(
        f"{name} {verdict.spread(values, '.0f')}"
        for name, values in zip(("hash", "switch", "locmoe"), early)
    )
    return Claim(
        f"Early perplexity is between hash's and switch's (step {step})",
        "between",
        told,
        verdict.count(len(seeds), "seed"),
        how,
        *verdict.all_of(between, "it is between in every seed"),
    )


def _by_seed(rows: List[Row], router: str) -> Dict[int, Row]:
    return {
        row["seed"]: row
        for row in rows
        if (row["router"], row["levels"], row["sharding"], row["capacity"])
        == (router, 1, "domain", "factor")
    }


def placement_claims(folder: Path) -> List[Claim]:
    found = json.loads((folder / "placement.json").read_text(encoding="utf-8"))
    rows = {(row["policy"], row["seed"]): row for row in found["rows"] if row["steps"] == "after"}
    seeds = sorted(
        {seed for policy, seed in rows if policy == "on"}
        & {seed for policy, seed in rows if policy == "off"}
    )

    def gone(key: str) -> List[float]:
        return [1 - rows["on", seed][key] / rows["off", seed][key] for seed in seeds]

    step = gone("step_seconds")
    moved = gone("inter_node_bytes")
    ours = (
        f"step {verdict.spread([-v for v in step], '+.1%')}, bytes between nodes "
        f"{verdict.spread([-v for v in moved], '+.0%')}; losses differ by "
        f"{found['largest_loss_difference']:.0e}"
    )
    rule = verdict.positive([min(a, b) for a, b in zip(step, moved)], "step and bytes both fall")
    return [
        Claim(
            "In the stable state, placing experts by forecast pays (2404.16914)",
            "suggested, no figure",
            ours,
            verdict.count(len(seeds), "seed"),
            f"scripts/measure_placement.sh: {found['machine']}; a run that starts badly placed",
            *rule,
        )
    ]


COMPARISON = Recorded(
    "compare_routers",
    ("bash", "scripts/compare_routers.sh", "--core", "--results", "docs/results"),
    ("compare_routers.json", "compare_losses.json"),
    comparison_claims,
    "Seconds of a step on the emulated cluster, and validation loss over steps and seconds",
)
PLACEMENT = Recorded(
    "placement",
    ("bash", "scripts/measure_placement.sh", "--results", "docs/results"),
    ("placement.json",),
    placement_claims,
    "A run that starts badly placed, with and without moves",
)
