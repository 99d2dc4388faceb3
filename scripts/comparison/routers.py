"""The comparison of routers on an emulated cluster: what compare_routers.sh runs.

Each router is trained twice. A loss run trains all steps in one process that emulates the nodes: a
step is the same whatever number of processes makes it, and one process is several times faster on
few cores. A timing run copies that run's checkpoint before the last steps to the emulated cluster,
where the links are slow, and makes the last steps there: its routing is that of a trained model,
its losses must be those of the loss run, and its seconds and bytes are what is compared. Whatever a
run directory holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from study.experiment import machine as this_machine

from comparison import report as compare_report
from pangu_locmoe.config.stored import load_stored_config

Point = Tuple[float, float, float]
"""1 / (Mbit/s), seconds in the exchange, seconds in the rest of the step"""

NODES = 2
RANKS_PER_NODE = 2
SETTLING = 4  # first steps of a timing run, which compile and touch memory for the first time


@dataclass(frozen=True)
class Variant:
    """One router as it is compared."""

    router: str
    levels: int
    sharding: str
    capacity: str = "factor"

    @property
    def name(self) -> str:
        return f"{self.router}-{self.levels}-{self.sharding}" + (
            "-bound" if self.capacity == "bound" else ""
        )

    def settings(self, steps: int) -> List[str]:
        values = [
            f"moe.router={self.router}",
            f"moe.levels={self.levels}",
            f"data.sharding={self.sharding}",
            f"moe.capacity.policy={self.capacity}",
        ]
        if self.sharding == "iid":
            values.append("moe.locality_loss=0")  # all nodes see alike tokens: it could only cost
        if self.capacity == "bound":
            values.append(f"moe.capacity.warmup_steps={max(1, steps // 3)}")
        return values


CORE = [
    Variant("hash", 1, "domain"),
    Variant("switch", 1, "domain"),
    Variant("locmoe", 1, "domain"),
    Variant("hash", 2, "domain"),
]
MORE = [
    Variant("locmoe", 1, "domain", "bound"),
    *[Variant(router, 1, "iid") for router in ("hash", "switch", "locmoe")],
    *[Variant(router, 1, "content") for router in ("hash", "switch", "locmoe")],
    *[Variant(router, 2, "domain") for router in ("switch", "locmoe")],
    *[Variant(router, 2, "iid") for router in ("hash", "switch", "locmoe")],
    Variant("locmoe", 1, "iid", "bound"),
]


class Comparison:
    """All runs under one directory, each made once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.config = options.config
        self.output = options.output
        self.steps = options.steps
        self.timing_steps = options.timing_steps
        self.seeds = options.seeds
        self.sets = options.set
        self.output.mkdir(parents=True, exist_ok=True)
        self.more_seeds = options.more_seeds
        self.rates: List[
            Tuple[Optional[float], str]
        ] = []  # with the share of hash's step that each is for
        self.link_only = False  # whether the shares are of the links' part of the exchange

    def run(self, shares: List[float], rates: List[str], chosen: List[Variant]) -> None:
        """Loss runs and timing runs of the core and then of the others, all routers of a seed side
        by side.

        Args:
            shares: find the link rates that give these.
            rates: use these instead.
            chosen: what to compare.
        """
        self.rates = [(None, rate) for rate in rates]
        for group, number in ((CORE, self.seeds), (MORE, self.more_seeds)):
            seeds, group = range(1, number + 1), [variant for variant in group if variant in chosen]
            for seed in seeds:
                for variant in group:
                    self.loss_run(variant, seed)
            if not self.rates:
                self.find_rates(shares)
            for _, rate in self.rates:
                for seed in seeds:
                    for variant in group:
                        self.timing_run(variant, seed, rate)
                        self.write_rows()

    def loss_run(self, variant: Variant, seed: int) -> Path:
        """All steps in one process; its checkpoint before the last `timing_steps` stays."""
        run_dir = self.output / "loss" / f"{variant.name}-seed{seed}"
        if not (run_dir / "summary.json").exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            command = [
                sys.executable,
                "-m",
                "pangu_locmoe",
                "train",
                self.config,
                *self._sets(variant, seed),
            ]
            self._call(
                [*command, "--run-dir", str(run_dir), "--no-progress"],
                f"{variant.name} seed {seed}: {self.steps} steps in one process",
            )
            shutil.rmtree(run_dir / "checkpoints" / f"step-{self.steps:08d}")
        return run_dir

    def timing_run(self, variant: Variant, seed: int, rate: str, folder: str = "timing") -> Path:
        """The last steps of the loss run on the emulated cluster."""
        run_dir = self.output / folder / rate / f"{variant.name}-seed{seed}"
        if not ((run_dir / "summary.json").exists() and (run_dir / "links.json").exists()):
            shutil.rmtree(run_dir, ignore_errors=True)
            source = self.loss_run(variant, seed)
            checkpoint = f"checkpoints/step-{self.steps - self.timing_steps:08d}"
            shutil.copytree(source / checkpoint, run_dir / checkpoint)
            shutil.copy(source / "config.yaml", run_dir)
            command = [
                "bash",
                "scripts/emulate_cluster.sh",
                self.config,
                *self._sets(variant, seed),
                "--set",
                "evaluation.sequences=4",
            ]
            command += ["--ranks-per-node", str(RANKS_PER_NODE), "--rate", rate]
            self._call(
                [*command, "--run-dir", str(run_dir), "--resume", "auto", "--no-progress"],
                f"{variant.name} seed {seed}: {self.timing_steps} steps at {rate}",
            )
            shutil.rmtree(run_dir / "checkpoints")
        return run_dir

    def find_rates(self, shares: List[float]) -> None:
        """The link rates at which hash's exchange takes these shares of its step.

        Where it takes more than the smallest of them on links without any limit, what the links add
        to it takes them instead.
        """
        points = {rate: self._point(CORE[0], rate) for rate in ("unlimited", "100mbit")}
        _, exchange, other = points["unlimited"]
        self.link_only = exchange / (exchange + other) >= min(shares)
        if self.link_only:
            say(
                f"without any limit the exchange takes {exchange / (exchange + other):.1%} "
                "of hash's step: shares are of what the links add"
            )
        self.rates = [(share, self._calibrate(share, points)) for share in shares]

    def _calibrate(self, target: float, points: Dict[str, Point]) -> str:
        """One rate, by at most four further measurements, which join `points`.

        Exchange and the rest of a step are straight lines in 1/rate, because a link's time is
        bytes/rate; both are fitted to what was measured so far, and the rate they give is measured
        next.
        """
        measured = 0
        while True:
            start = (
                fit([(x, exchange) for x, exchange, _ in points.values()])[0]
                if self.link_only
                else 0.0
            )
            misses = {
                rate: abs((exchange - start) / (exchange + other) - target)
                for rate, (_, exchange, other) in points.items()
                if rate != "unlimited"
            }
            nearest = min(misses, key=misses.__getitem__)
            rate = solve(list(points.values()), target, self.link_only)
            if misses[nearest] < 0.01 or rate is None or rate in points or measured == 4:
                break
            points[rate] = self._point(CORE[0], rate)
            measured += 1
        say(f"link rate for {target:.0%} of hash's step: {nearest}, {misses[nearest]:.1%} off")
        return nearest

    def _point(self, variant: Variant, rate: str) -> Point:
        # Not among the results: those have all routers side by side.
        rows = timed_rows(self.timing_run(variant, 1, rate, "calibration"))
        exchange = statistics.median(row["exchange_seconds"] for row in rows)
        step = statistics.median(row["step_seconds"] for row in rows)
        say(
            f"{variant.name} at {rate}: step {step:.3f} s, exchange {exchange:.3f} s, "
            f"{exchange / step:.1%}"
        )
        return (
            0.0 if rate == "unlimited" else 1 / float(rate.removesuffix("mbit")),
            exchange,
            step - exchange,
        )

    def _sets(self, variant: Variant, seed: int) -> List[str]:
        values = [
            f"parallel.nodes={NODES}",
            f"train.steps={self.steps}",
            f"train.seed={seed}",
            f"checkpoint.every={self.steps - self.timing_steps}",
            "checkpoint.keep=2",
        ]
        return [
            word
            for value in [*self.sets, *values, *variant.settings(self.steps)]
            for word in ("--set", value)
        ]

    def _call(self, command: List[str], what: str) -> None:
        started = time.monotonic()
        log = self.output / "last.log"
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            print("\n".join(log.read_text(encoding="utf-8").splitlines()[-20:]), file=sys.stderr)
            raise SystemExit(
                f"compare_routers: {what}: exit code {code}; the whole log is {log}; "
                "finished runs are kept, call again to continue"
            )
        say(f"{what} ({time.monotonic() - started:.0f} s)")

    def write_rows(self) -> None:
        """compare_routers.json from all finished timing runs, and compare_losses.json from all
        loss runs.
        """
        rows = []
        for share, rate in self.rates:
            for variant in [*CORE, *MORE]:
                for seed in range(1, max(self.seeds, self.more_seeds) + 1):
                    timing = self.output / "timing" / rate / f"{variant.name}-seed{seed}"
                    if (timing / "links.json").exists() and (timing / "summary.json").exists():
                        rows.append(
                            {
                                **self._row(variant, seed, rate, timing),
                                "target_share": share,
                                "target_share_of": "links" if self.link_only else "exchange",
                            }
                        )
        add_shares(rows)
        (self.output / "compare_routers.json").write_text(
            json.dumps(rows, indent=1) + "\n", encoding="utf-8"
        )
        curves = {}
        for run_dir in sorted((self.output / "loss").iterdir()):
            if (run_dir / "summary.json").exists():
                lines = [
                    json.loads(line)
                    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                ]
                curves[run_dir.name] = {
                    "validation": [
                        [line["step"], line["validation_loss"]]
                        for line in lines
                        if "validation_loss" in line
                    ],
                    "local_fraction": [
                        line["local_fraction"] for line in lines if "step_seconds" in line
                    ],
                }
        (self.output / "compare_losses.json").write_text(
            json.dumps(curves) + "\n", encoding="utf-8"
        )

    def _row(self, variant: Variant, seed: int, rate: str, timing: Path) -> Dict[str, Any]:
        rows = timed_rows(timing)
        loss_dir = self.output / "loss" / timing.name
        trained = training_rows(loss_dir)
        summary = json.loads((loss_dir / "summary.json").read_text(encoding="utf-8"))
        final = summary["final"]
        settled = [row for row in trained if row["step"] > self.steps // 2]
        losses = {row["step"]: row["loss"] for row in trained}
        account = json.loads((timing / "links.json").read_text(encoding="utf-8"))["account"]
        seconds = sorted(row["step_seconds"] for row in rows)

        def median(key: str) -> Optional[float]:
            values = [row[key] for row in rows if row.get(key) is not None]
            return statistics.median(values) if values else None

        return {
            "router": variant.router,
            "levels": variant.levels,
            "sharding": variant.sharding,
            "link_rate": rate,
            "capacity": variant.capacity,
            "capacity_slots": rows[-1]["capacity"],
            "seed": seed,
            "steps": self.steps,
            "timed_steps": len(rows),
            "step_seconds": median("step_seconds"),
            "step_seconds_quartiles": [seconds[len(seconds) // 4], seconds[3 * len(seconds) // 4]],
            "exchange_seconds": median("exchange_seconds"),
            "reduce_seconds": median("reduce_seconds"),
            "reduction": reduction_of(timing, rows),
            "reduce_inter_node_bytes": median("reduce_inter_node_bytes"),
            "inter_node_bytes": median("inter_node_bytes"),
            "intra_node_bytes": median("intra_node_bytes"),
            "wire_bytes_per_step": account["wire_bytes"] / account["steps"]
            if account["steps"]
            else None,
            "ledger_error": account["ledger_error"],
            "local_fraction": median("local_fraction"),
            "max_over_mean_load": statistics.mean(row["max_over_mean_load"] for row in settled),
            "dropped_fraction": statistics.mean(row["dropped_fraction"] for row in settled),
            "validation_loss": final["validation_loss"],
            "validation_loss_by_domain": final["validation_loss_by_domain"],
            "validation_blocks": summary.get("final_blocks"),
            "loss_difference": max(
                abs(row["loss"] - losses[row["step"]]) for row in training_rows(timing)
            ),
        }


def add_shares(rows: List[Dict[str, Any]]) -> None:
    """What the exchange takes of hash's step at each link rate, into every row of that rate."""
    shares: Dict[str, List[float]] = {row["link_rate"]: [] for row in rows}
    for row in rows:
        if row["router"] == "hash" and row["levels"] == 1 and row["sharding"] == "domain":
            shares[row["link_rate"]].append(row["exchange_seconds"] / row["step_seconds"])
    for row in rows:
        measured = shares[row["link_rate"]]
        row["hash_exchange_share"] = statistics.mean(measured) if measured else None


def publish(new: Path, results: Path) -> None:
    """Add rows and curves to those in `results`, of which the same runs are replaced, and draw
    them all.
    """
    results.mkdir(parents=True, exist_ok=True)
    rows = {
        _key(row): row
        for folder in (results, new)
        for row in _read(folder / "compare_routers.json", [])
    }
    curves = {
        **_read(results / "compare_losses.json", {}),
        **_read(new / "compare_losses.json", {}),
    }
    order = {
        (variant.router, variant.levels, variant.sharding, variant.capacity): position
        for position, variant in enumerate([*CORE, *MORE])
    }
    together = sorted(
        rows.values(),
        key=lambda row: (
            -float(row["link_rate"].removesuffix("mbit")),
            order[_key(row)[:4]],
            row["seed"],
        ),
    )
    add_shares(together)
    (results / "compare_routers.json").write_text(
        json.dumps(together, indent=1) + "\n", encoding="utf-8"
    )
    (results / "compare_losses.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    compare_report.write(results, this_machine())


def _key(row: Dict[str, Any]) -> Tuple[Any, ...]:
    return (
        row["router"],
        row["levels"],
        row["sharding"],
        row["capacity"],
        row["link_rate"],
        row["seed"],
    )


def _read(file: Path, otherwise: Any) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else otherwise


def training_rows(run_dir: Path) -> List[Dict[str, Any]]:
    lines = (
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return [line for line in lines if "step_seconds" in line]


def reduction_of(run_dir: Path, rows: List[Dict[str, Any]]) -> str:
    """How the gradients were added up; rows without its bytes are older than the choice."""
    if rows[-1].get("reduce_inter_node_bytes") is None:
        return "flat"
    chosen = load_stored_config(run_dir / "config.yaml").parallel.reduction
    return chosen or "hierarchical"


def timed_rows(run_dir: Path) -> List[Dict[str, Any]]:
    """The steps of a timing run that count."""
    return training_rows(run_dir)[SETTLING:]


def solve(points: List[Point], target: float, link_only: bool) -> Optional[str]:
    """The rate at which fitted lines give the target share; with `link_only`, of the part that
    grows with 1/rate.

    None where no rate does, because the gradients take more of the links.
    """
    (e0, e1), (o0, o1) = (
        fit([(x, exchange) for x, exchange, _ in points]),
        fit([(x, other) for x, _, other in points]),
    )
    # (e0 + e1 x) = target (e0 + o0 + (e1 + o1) x), or without the first e0
    slope = e1 - target * (e1 + o1)
    rest = target * (e0 + o0) - (0 if link_only else e0)
    return f"{slope / rest:.0f}mbit" if slope > 0 and rest > 0 else None


def fit(points: List[Tuple[float, float]]) -> Tuple[float, float]:
    """Least squares: value at 0 and slope, neither below 0."""
    slope, start = np.polyfit([x for x, _ in points], [y for _, y in points], 1).tolist()
    return max(start, 0.0), max(slope, 0.0)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S ") + text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, required=True)
    parser.add_argument(
        "--more-seeds", type=int, required=True, help="seeds of the variants beyond the core"
    )
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--timing-steps", type=int, required=True)
    parser.add_argument("--shares", required=True, help="percent, with commas")
    parser.add_argument("--rates", default="", help="link rates with commas, instead of shares")
    parser.add_argument("--core", action="store_true", help="only the core variants")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        type=lambda name: name.replace("-cluster", "-content"),  # the name before
        choices=[variant.name for variant in [*CORE, *MORE]],
    )
    parser.add_argument(
        "--results", type=Path, help="where rows, table and picture are added to what is there"
    )
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    chosen = [
        variant
        for variant in (CORE if options.core else [*CORE, *MORE])
        if not options.only or variant.name in options.only
    ]
    comparison = Comparison(options)
    comparison.run(
        [float(share) / 100 for share in options.shares.split(",")],
        [rate for rate in options.rates.split(",") if rate],
        chosen,
    )
    comparison.write_rows()
    compare_report.write(options.output, this_machine())
    if options.results is not None:
        publish(options.output, options.results)
    print((options.output / "compare_routers.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
