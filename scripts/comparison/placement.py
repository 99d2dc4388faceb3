"""The measured effect of moving experts: what measure_placement.sh runs.

Two runs for each seed, one after the other: with the configuration's placement policy, and with
none. They make the same losses, so the run without moves is what the other would have gone on like.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Tuple

import matplotlib

from comparison.routers import say

matplotlib.use("Agg")
from matplotlib import pyplot
from study.experiment import machine

SETTLING = 4  # first steps of a run, and after a move
MEASURES = (
    "step_seconds",
    "exchange_seconds",
    "inter_node_bytes",
    "local_fraction",
    "max_over_mean_load",
)
COLOURS = {"off": "#8a8f98", "on": "#12876f"}


def run(options: argparse.Namespace, seed: int, policy: str) -> Path:
    """One run on the emulated cluster; `policy` is on or off."""
    run_dir: Path = options.output / f"{policy}-seed{seed}"
    if not (run_dir / "summary.json").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        sets = [
            *options.set,
            f"train.seed={seed}",
            *(["placement.policy=off"] if policy == "off" else []),
        ]
        command = [
            "bash",
            "scripts/emulate_cluster.sh",
            options.config,
            "--nodes",
            "2",
            "--ranks-per-node",
            "2",
            "--rate",
            options.rate,
        ]
        command += [word for value in sets for word in ("--set", value)]
        with (options.output / "last.log").open("w", encoding="utf-8") as log:
            code = subprocess.run(
                [*command, "--run-dir", str(run_dir), "--no-progress"],
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code:
            raise SystemExit(
                f"measure_placement: exit code {code}; the log is {log.name}; finished "
                "runs are kept, call again to continue"
            )
        shutil.rmtree(run_dir / "checkpoints")
    return run_dir


def read(run_dir: Path) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """Training rows and placement events."""
    lines = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if "step_seconds" in line], [
        line for line in lines if line.get("event") == "placement"
    ]


def measure(run_dir: Path, seed: int, policy: str, moved_at: int) -> List[Dict[str, Any]]:
    """The medians before the move and after it; of a run without moves, of the same steps."""
    rows = read(run_dir)[0]
    spans = {"before": (SETTLING, moved_at), "after": (moved_at + SETTLING, rows[-1]["step"])}
    return [
        {
            "policy": policy,
            "seed": seed,
            "steps": when,
            "first_step": first + 1,
            "last_step": last,
            **{
                name: statistics.median(row[name] for row in rows if first < row["step"] <= last)
                for name in MEASURES
            },
        }
        for when, (first, last) in spans.items()
    ]


def table(rows: List[Dict[str, Any]]) -> str:
    names = "placement | steps | step, s | exchange, s | MB between nodes | local"
    lines = [f"| {names} |", "|---" * (names.count("|") + 1) + "|"]
    for policy in ("off", "on"):
        for when in ("before", "after"):
            group = [row for row in rows if (row["policy"], row["steps"]) == (policy, when)]

            def spread(
                name: str, form: str, scale: float = 1.0, group: List[Dict[str, Any]] = group
            ) -> str:
                values = [row[name] * scale for row in group]
                return (
                    f"{statistics.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"
                )

            cells = [
                spread("step_seconds", ".3f"),
                spread("exchange_seconds", ".3f"),
                spread("inter_node_bytes", ".2f", 1e-6),
                spread("local_fraction", ".2f"),
            ]
            lines.append(f"| {policy} | {when} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(options: argparse.Namespace, seeds: List[int], path: Path) -> None:
    """Bytes between nodes and seconds of a step, over the steps of the seeds in which experts
    moved.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, name, label, scale in (
        (axes[0], "inter_node_bytes", "MB between nodes in a step", 1e-6),
        (axes[1], "step_seconds", "seconds of a step", 1.0),
    ):
        for policy in ("off", "on"):
            for seed in seeds:
                rows, events = read(options.output / f"{policy}-seed{seed}")
                steps = [row["step"] for row in rows]
                values = [row[name] * scale for row in rows]
                smooth = [
                    statistics.median(values[max(0, index - 4) : index + 5])
                    for index in range(len(values))
                ]
                label_of = (
                    {"off": "experts stay", "on": "experts move"}[policy]
                    if seed == seeds[0]
                    else None
                )
                axis.plot(
                    steps[SETTLING:],
                    smooth[SETTLING:],
                    color=COLOURS[policy],
                    lw=1.2,
                    alpha=0.8,
                    label=label_of,
                )
                for event in events:
                    if event["experts_moved"]:
                        axis.axvline(event["step"], color=COLOURS["on"], lw=0.6, ls=":")
        axis.set_xlabel("step")
        axis.set_ylabel(f"{label} (median of 9)")
        axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--rate", required=True)
    parser.add_argument("--seeds", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    moves = []
    difference = 0.0
    for seed in range(1, options.seeds + 1):
        runs = {policy: run(options, seed, policy) for policy in ("off", "on")}
        (still, _), (moved, events) = read(runs["off"]), read(runs["on"])
        first = next((event for event in events if event["experts_moved"]), None)
        if first is None:
            say(f"seed {seed}: experts were well placed, nothing moved")
            continue
        difference = max(
            difference, *(abs(one["loss"] - other["loss"]) for one, other in zip(still, moved))
        )
        moves.append({"seed": seed, **first})
        for policy, run_dir in runs.items():
            rows += measure(run_dir, seed, policy, first["step"])
        say(
            f"seed {seed}: {first['experts_moved']} experts moved after step "
            f"{first['step']} in {first['seconds']:.2f} s, modelled gain "
            f"{first['gain']:.0%}"
        )
    if not moves:
        raise SystemExit(
            "measure_placement: no seed moved any experts: its text was dealt to the nodes "
            "that hold them; try other seeds"
        )
    where = (
        f"{machine()}; 2 nodes x 2 ranks, links of {options.rate}; seeds "
        f"{', '.join(str(move['seed']) for move in moves)}"
    )
    content = {
        "machine": where,
        "config": options.config,
        "largest_loss_difference": difference,
        "moves": moves,
        "rows": rows,
    }
    (options.output / "placement.json").write_text(
        json.dumps(content, indent=1) + "\n", encoding="utf-8"
    )
    picture(options, [move["seed"] for move in moves], options.output / "placement.svg")
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        for name in ("placement.json", "placement.svg"):
            shutil.copy(options.output / name, options.results)
    print(
        f"{where}; medians of the steps before and after the move, mean over seeds with "
        f"the lowest and highest; losses differ by {difference:.1e} at most\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
