"""Table, verdicts and picture from the rows that compare_routers.py wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from study.documents import on_other_documents

from pangu_locmoe.report.pictures import ROUTERS

Row = Dict[str, Any]
Key = Tuple[str, int, str, str]  # router, levels, sharding, capacity

TARGETS = {"hash": 0.1268, "switch": 0.2224}  # how much shorter LocMoE's step is in the paper


def write(folder: Path, machine: str) -> None:
    """compare_routers.md and compare_routers.svg beside the rows."""
    rows = json.loads((folder / "compare_routers.json").read_text(encoding="utf-8"))
    curves = json.loads((folder / "compare_losses.json").read_text(encoding="utf-8"))
    text = [_head(rows, machine)]
    for rate in _rates(rows):
        at_rate = [row for row in rows if row["link_rate"] == rate]
        text += [f"### {_title(at_rate[0])}\n", _table(at_rate), *_verdicts(at_rate), ""]
    (folder / "compare_routers.md").write_text("\n".join(text), encoding="utf-8")
    _picture(rows, curves, folder / "compare_routers.svg")


def _head(rows: List[Row], machine: str) -> str:
    seeds = sorted({row["seed"] for row in rows})
    difference = max(row["loss_difference"] for row in rows)
    errors = [
        abs(row["ledger_error"])
        for row in rows
        if row["ledger_error"] is not None and row["inter_node_bytes"] > 1e5
    ]
    return (
        f"{machine}; {rows[0]['steps']} steps, the last {rows[0]['timed_steps']} of them "
        f"timed; seeds {', '.join(map(str, seeds))}. "
        "Means over seeds of each run's median, with the lowest and highest seed in brackets. "
        f"Losses on the cluster and in one process differ by {difference:.1e} at most; the "
        f"ledger and the links' counters by {max(errors, default=0):.1%} at most.\n"
    )


def _title(row: Row) -> str:
    title = f"Links of {row['link_rate']}"
    share = row["hash_exchange_share"]
    aim = row["target_share"]
    if share is not None:
        title += f": the exchange is {share:.1%} of hash's step"
    if aim is not None:
        title += f" (aim: {aim:.0%}" + (
            " beyond what it takes without any limit)" if row["target_share_of"] == "links" else ")"
        )
    return title


def _rates(rows: List[Row]) -> List[str]:
    return list(dict.fromkeys(row["link_rate"] for row in rows))


def _groups(rows: List[Row]) -> Dict[Key, List[Row]]:
    groups: Dict[Key, List[Row]] = {}
    for row in rows:
        groups.setdefault(
            (row["router"], row["levels"], row["sharding"], row["capacity"]), []
        ).append(row)
    return groups


def _table(rows: List[Row]) -> str:
    names = (
        "router | levels | sharding | capacity | step, s | exchange, s | rest, s | MB between "
        "nodes | local | max/mean load | dropped | validation loss | on other documents, 95%"
    )
    lines = [f"| {names} |", "|" + "---|" * (names.count("|") + 1)]
    for (router, levels, sharding, capacity), group in _groups(rows).items():
        slots = group[0]["capacity_slots"]
        cells = [
            router,
            str(levels),
            sharding,
            f"{capacity} ({slots})" if slots else capacity,
            _spread([row["step_seconds"] for row in group], ".2f"),
            _spread([row["exchange_seconds"] for row in group], ".3f"),
            f"{_mean(group, 'step_seconds') - _mean(group, 'exchange_seconds'):.2f}",
            f"{_mean(group, 'inter_node_bytes') / 1e6:.2f}",
            f"{_mean(group, 'local_fraction'):.2f}",
            f"{_mean(group, 'max_over_mean_load'):.2f}",
            f"{_mean(group, 'dropped_fraction'):.1%}",
            _spread([row["validation_loss"] for row in group], ".3f"),
            on_other_documents([row.get("validation_blocks") for row in group]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _verdicts(rows: List[Row]) -> Iterator[str]:
    """Target by target, for single-level locmoe under domain sharding."""
    groups = _groups(rows)
    ours, base, switch = (
        groups.get((router, 1, "domain", "factor")) for router in ("locmoe", "hash", "switch")
    )
    local = groups.get(("hash", 2, "domain", "factor"))
    if not ours or not base or not switch:
        return
    for name, other in (("hash", base), ("switch", switch)):
        shorter = [1 - b["step_seconds"] / a["step_seconds"] for a, b in _pairs(other, ours)]
        yield _verdict(f"step shorter than {name}'s", shorter, ".2%", TARGETS[name], True)
    if local:
        # What is left where nothing crosses is not the links' doing.
        gone = [
            1
            - (o["exchange_seconds"] - n["exchange_seconds"])
            / (h["exchange_seconds"] - n["exchange_seconds"])
            for (h, o), (_, n) in zip(_pairs(base, ours), _pairs(base, local))
        ]
        yield _verdict("of hash's inter-node exchange time gone", gone, ".0%", 0.8, True)
    yield _verdict(
        "inter-node bytes, of hash's",
        [b["inter_node_bytes"] / a["inter_node_bytes"] for a, b in _pairs(base, ours)],
        ".2f",
        0.25,
        False,
    )
    yield _verdict(
        "local fraction, where the sharding allows 1",
        [row["local_fraction"] for row in ours],
        ".2f",
        0.85,
        True,
    )
    yield _verdict(
        "max/mean load, second half", [row["max_over_mean_load"] for row in ours], ".2f", 1.5, False
    )
    yield _verdict(
        "dropped at capacity 1.25, second half",
        [row["dropped_fraction"] for row in ours],
        ".1%",
        0.02,
        False,
    )
    yield _verdict(
        "validation loss over switch's",
        [b["validation_loss"] / a["validation_loss"] - 1 for a, b in _pairs(switch, ours)],
        ".1%",
        0.02,
        False,
    )
    together = _pairs(switch, ours)
    apart = on_other_documents(
        [b.get("validation_blocks") for _, b in together],
        "+.3f",
        [a.get("validation_blocks") for a, _ in together],
    )
    yield f"- validation loss less switch's, on other documents (95%): {apart}"


def _verdict(what: str, values: List[float], form: str, target: float, at_least: bool) -> str:
    mean = statistics.mean(values)
    met = mean >= target if at_least else mean <= target
    return (
        f"- {what}: {_spread(values, form)}; target {'at least' if at_least else 'at most'} "
        f"{target:{form}}: {'met' if met else 'MISSED'}"
    )


def _pairs(first: List[Row], second: List[Row]) -> List[Tuple[Row, Row]]:
    """Rows of the same seed."""
    by_seed = {row["seed"]: row for row in second}
    return [(row, by_seed[row["seed"]]) for row in first if row["seed"] in by_seed]


def _mean(rows: List[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _spread(values: List[float], form: str) -> str:
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"


def _picture(rows: List[Row], curves: Dict[str, Any], path: Path) -> None:
    """Bars for each link rate and sharding at which several routers ran, and the curves of
    validation loss under domain sharding.
    """
    panels: Dict[Tuple[str, str], List[Row]] = {}
    for row in rows:
        panels.setdefault((row["link_rate"], row["sharding"]), []).append(row)
    panels = {key: group for key, group in panels.items() if len(_groups(group)) > 1}
    compared = [rate for rate, sharding in panels if sharding == "domain"]
    number = len(panels) + (2 if compared else 0)
    if number == 0:
        return
    figure, axes = pyplot.subplots(
        1, number, figsize=(4.6 * number, 4.4), layout="constrained", squeeze=False
    )
    for axis, group in zip(axes[0], panels.values()):
        _bars(axis, group)
    if compared:
        at_rate = [row for row in rows if row["link_rate"] == compared[-1]]
        _curves(axes[0][-2], at_rate, curves, None)
        _curves(axes[0][-1], at_rate, curves, compared[-1])
    figure.savefig(path)


def _bars(axis: Any, rows: List[Row]) -> None:
    for position, ((router, levels, _, capacity), group) in enumerate(_groups(rows).items()):
        step = _mean(group, "step_seconds")
        exchange = _mean(group, "exchange_seconds")
        axis.bar(position, step - exchange, color=ROUTERS[router], alpha=0.45)
        axis.bar(position, exchange, bottom=step - exchange, color=ROUTERS[router])
        axis.text(position, step, f"{step:.2f}", ha="center", va="bottom", fontsize=8)
        axis.plot(
            [position] * len(group), [row["step_seconds"] for row in group], "k_", markersize=6
        )
        axis.text(
            position,
            -0.01,
            f"{router}\n{levels} level{'s' * (levels > 1)}\n{capacity * (capacity == 'bound')}",
            ha="center",
            va="top",
            fontsize=8,
            transform=axis.get_xaxis_transform(),
        )
    axis.set_xticks([])
    axis.set_ylabel("seconds a step; dark: exchange")
    axis.set_title(f"{rows[0]['link_rate']}, {rows[0]['sharding']} sharding", fontsize=10)


def _curves(axis: Any, rows: List[Row], curves: Dict[str, Any], rate: Optional[str]) -> None:
    """Validation loss over steps, or over seconds at a link rate; `rows` are of one rate."""
    for (router, levels, sharding, capacity), group in _groups(rows).items():
        if sharding != "domain" or capacity != "factor" or (router != "hash" and levels == 2):
            continue
        style = "--" if levels == 2 else "-"
        for row in group:
            curve = curves[f"{router}-{levels}-{sharding}-seed{row['seed']}"]
            steps, losses = zip(*curve["validation"])
            scale = (
                _seconds(rows, curve["local_fraction"], row)
                if rate
                else [float(step) for step in range(row["steps"] + 1)]
            )
            label = (
                f"{router}, {levels} level{'s' * (levels > 1)}"
                if row["seed"] == group[0]["seed"]
                else None
            )
            axis.plot(
                [scale[step] for step in steps],
                losses,
                style,
                color=ROUTERS[router],
                lw=1.2,
                alpha=0.8,
                label=label,
            )
    axis.set_xlabel(f"seconds at {rate}" if rate else "steps")
    axis.set_ylabel("validation loss")
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    axis.legend(unique.values(), unique.keys(), fontsize=8)


def _seconds(rows: List[Row], local: List[float], row: Row) -> List[float]:
    """Seconds up to each step: the timed step, with an exchange as long as the tokens that cross
    in each step make it.
    """
    slope, start = np.polyfit(
        [1 - other["local_fraction"] for other in rows],
        [other["exchange_seconds"] for other in rows],
        1,
    ).tolist()
    rest = row["step_seconds"] - row["exchange_seconds"]
    total = [0.0]
    for fraction in local:
        total.append(total[-1] + rest + start + slope * (1 - fraction))
    return total
