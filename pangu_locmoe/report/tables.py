"""The numbers of a report: headline, comparison, domains, experts, capacity bound, configuration
differences.
"""

from __future__ import annotations

import html
import json
import math
from typing import Any

import numpy as np

from pangu_locmoe.report.figures import layer_name
from pangu_locmoe.report.run import Run, number, table
from pangu_locmoe.report.series import compact, duration, last_mean, median, percent, tail, text

DASH = "–"
UNITS = ("documents", "sequences", "tokens")
"""what a validation figure was measured on"""


def table_html(header: list[str], rows: list[list[str]], wide: bool = False) -> str:
    """A table of plain text (escaped here); the first column names the row.

    Empty if there are no rows.
    """
    if not rows:
        return ""
    kinds = [
        " class=t" if any(cell and cell[0].isalpha() for cell in column) else ""
        for column in zip(*rows)
    ]  # words stand left, numbers right
    head = "".join(
        f'<th scope="col"{kind}>{html.escape(cell)}</th>' for cell, kind in zip(header, kinds)
    )
    lines = (
        [f"<td{kind}>{html.escape(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:])]
        for row in rows
    )
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(line)}</tr>'
        for row, line in zip(rows, lines)
    )
    return (
        "<div "
        f'class="scroll"><table{" class=text" if wide else ""}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def headline(run: Run) -> list[tuple[str, str, str]]:
    """(measure, value, remark) for the top of the page."""
    summary = run.summary
    final = run.final
    bits = number(final.get("bits_per_byte"))
    bigram = number(table(summary, "bigram_bits_per_byte").get("all"))
    parameters = number(summary.get("parameters"))
    active = number(summary.get("active_parameters"))
    saved = f"byte bigram {text(bigram)}" if math.isfinite(bigram) else "no byte-bigram baseline"
    if math.isfinite(bits) and math.isfinite(bigram) and bigram > 0:
        saved += f", {percent(abs(1 - bits / bigram))} {'below' if bits <= bigram else 'above'}"
    steps = run.column("step")
    trained = number(final.get("step"))
    ending = "last row" if tail(len(steps)) == 1 else f"mean of the last {tail(len(steps))} rows"
    local = last_mean(run.column("local_fraction"))
    return [
        (
            "Validation loss",
            text(number(final.get("validation_loss"))),
            _measured_on(final, f"nats per token, step {text(trained)}"),
        ),
        ("Bits per byte", text(bits), saved),
        ("Parameters", compact(parameters), f"{compact(active)} active per token"),
        (
            "Throughput",
            text(median(run.column("tokens_per_second")), 3),
            "tokens per second, median",
        ),
        (
            "Busiest expert",
            text(last_mean(run.column("max_over_mean_load")), 3),
            f"max / mean load, {ending}",
        ),
        (
            "Local tokens",
            percent(local),
            "stay in their node, " + ending
            if math.isfinite(local)
            else "one node, or not recorded",
        ),
        ("Dropped tokens", percent(last_mean(run.column("dropped_fraction"))), ending),
        (
            "Trained",
            duration(_wall(run)),
            f"{text(float(steps[-1]) if len(steps) else 0)} steps"
            + ("" if number(summary.get("wall_seconds")) > 0 else ", sum of step times"),
        ),
    ]


def _measured_on(final: dict[str, Any], remark: str) -> str:
    """The remark with the documents behind the figure, and where other documents would have it."""
    behind = _behind(final)
    remark += f", {behind[0]} documents, {behind[1]} tokens" if behind else ""
    ends = final.get("validation_loss_interval")
    if isinstance(ends, list) and len(ends) == 2:
        remark += f"; other documents: {text(number(ends[0]))} to {text(number(ends[1]))} (95 %)"
    return remark


def _behind(final: dict[str, Any]) -> list[str]:
    """Documents and tokens of all domains; nothing where an older version did not count them."""
    domains = table(final, "measured_on")
    return (
        [
            _count(sum(number(table(domains, name).get(unit)) for name in domains))
            for unit in ("documents", "tokens")
        ]
        if domains
        else []
    )


def _count(value: Any) -> str:
    found = number(value)
    return f"{found:,.0f}" if math.isfinite(found) else DASH


def tiles_html(run: Run) -> str:
    """The headline of a single run."""
    tiles = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}<small>{html.escape(remark)}</small></dd></div>"
        for name, value, remark in headline(run)
    )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def comparison_html(runs: list[Run]) -> str:
    """Measures in rows, runs in columns."""
    units = {
        "Validation loss": ", nats per token",
        "Throughput": ", tokens/s, median",
        "Busiest expert": ", max / mean load",
    }
    columns = [{name: value for name, value, _ in headline(run)} for run in runs]
    rows = [
        [name + units.get(name, ""), *(column[name] for column in columns)] for name in columns[0]
    ]
    bigram = [
        "Byte-bigram baseline, bits per byte",
        *(text(number(table(run.summary, "bigram_bits_per_byte").get("all"))) for run in runs),
    ]
    active = [
        "Active parameters per token",
        *(compact(number(run.summary.get("active_parameters"))) for run in runs),
    ]
    steps = ["Steps", *(text(float(run.column("step")[-1]) if run.training else 0) for run in runs)]
    behind = [
        "Validation documents, tokens",
        *(", ".join(_behind(run.final)) or DASH for run in runs),
    ]
    rows = [*rows[:2], bigram, behind, rows[2], active, *rows[3:], steps]
    return table_html(["", *(run.name for run in runs)], rows)


def domains_html(runs: list[Run]) -> str:
    """Final bits per byte of each domain beside its baseline, the loss, and what they were
    measured on.
    """
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    several = len(runs) > 1
    rows = []
    for domain in domains:
        for run in runs:
            bits, loss = (
                number(table(run.final, key).get(domain))
                for key in ("bits_per_byte_by_domain", "validation_loss_by_domain")
            )
            bigram = number(table(run.summary, "bigram_bits_per_byte").get(domain))
            gain = percent(1 - bits / bigram) if bigram > 0 else DASH
            counts = table(table(run.final, "measured_on"), domain)
            behind = [_count(counts.get(unit)) for unit in UNITS]
            rows.append(
                [
                    domain,
                    *([run.name] if several else []),
                    text(loss),
                    text(bits),
                    text(bigram),
                    gain.replace("-", "−"),
                    *behind,
                ]
            )
    return table_html(
        [
            "Domain",
            *(["Run"] if several else []),
            "Validation loss (nats per token)",
            "Bits per byte",
            "Byte bigram",
            "Saved",
            *(unit.capitalize() for unit in UNITS),
        ],
        rows,
    )


def experts_html(runs: list[Run]) -> str:
    """Load of each sparse layer at the end of each run, from load.npz."""
    rows = []
    for run in runs:
        if run.load is None or not run.load.load_WLE.size:
            continue
        last = tail(len(run.load.load_WLE))
        load_LE = run.load.load_WLE[-last:].sum(axis=0).astype(np.float64)
        dropped_LE = (
            None if run.load.dropped_WLE is None else run.load.dropped_WLE[-last:].sum(axis=0)
        )
        for layer, load_E in enumerate(load_LE):
            total = float(load_E.sum())
            if total <= 0:
                continue
            dropped = math.nan if dropped_LE is None else float(dropped_LE[layer].sum()) / total
            cells = [
                text(load_E.max() / load_E.mean(), 3),
                percent(load_E.max() / total),
                percent(load_E.min() / total),
                str(int((load_E == 0).sum())),
                percent(dropped),
            ]
            rows.append([layer_name(run, layer), *([run.name] if len(runs) > 1 else []), *cells])
    return table_html(
        [
            "Layer",
            *(["Run"] if len(runs) > 1 else []),
            "Max / mean",
            "Largest share",
            "Smallest share",
            "Idle experts",
            "Dropped",
        ],
        rows,
    )


def capacity_html(runs: list[Run]) -> str:
    """The latest measurement of the capacity bound, layer by layer."""
    rows = []
    for run in runs:
        events = [
            event
            for event in run.events
            if event["event"] == "capacity" and isinstance(event.get("layers"), list)
        ]
        for layer in (
            layer for layer in (events[-1]["layers"] if events else []) if isinstance(layer, dict)
        ):
            cells = [
                text(number(layer.get(key)), 4)
                for key in ("delta", "exact", "erfc", "exponential", "floor", "capacity")
            ]
            rows.append(
                [
                    f"layer {layer.get('layer', '?')}",
                    *([run.name] if len(runs) > 1 else []),
                    text(number(events[-1].get("step"))),
                    *cells,
                ]
            )
    return table_html(
        [
            "Layer",
            *(["Run"] if len(runs) > 1 else []),
            "Step",
            "δ",
            "Exact",
            "erfc",
            "Exponential",
            "Floor by drops",
            "Capacity",
        ],
        rows,
    )


def placement_html(runs: list[Run]) -> str:
    """What every placement plan moved, and the load and bytes it was expected to change."""
    rows = []
    for run in runs:
        for event in (event for event in run.events if event["event"] == "placement"):
            now, after = (
                [
                    number(event.get(f"{key}_{when}"))
                    for key in ("max_over_mean", "inter_node_bytes")
                ]
                for when in ("now", "after")
            )
            cells = [
                text(number(event.get("experts_moved"))),
                megabytes(number(event.get("bytes_moved"))),
                percent(number(event.get("gain"))),
            ]
            cells += [
                f"{text(now[0], 3)} → {text(after[0], 3)}",
                f"{megabytes(now[1])} → {megabytes(after[1])}",
            ]
            rows.append(
                [text(number(event.get("step"))), *([run.name] if len(runs) > 1 else []), *cells]
            )
    names = [
        "Experts moved",
        "MB moved",
        "Modelled gain",
        "Max / mean of ranks",
        "MB between nodes",
    ]
    return table_html(["Step", *(["Run"] if len(runs) > 1 else []), *names], rows)


def megabytes(number_of_bytes: float) -> str:
    """Bytes in MB."""
    return text(number_of_bytes / 1e6, 3)


def differences_html(runs: list[Run]) -> str:
    """The configuration keys in which the runs differ; a line of text if they do not."""
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = [
        [key, *(values.get(key, DASH) for values in flat)]
        for key in keys
        if len({values.get(key) for values in flat}) > 1
    ]
    return (
        table_html(["Key", *(run.name for run in runs)], rows, wide=True)
        or "<p>The configurations are the same.</p>"
    )


def facts_html(run: Run) -> str:
    """Corpus counts and machine of the summary, if it has them."""
    tables = [
        table_html(
            [title, ""],
            [[key, value] for key, value in flatten(table(run.summary, name)).items()],
            wide=True,
        )
        for name, title in (("corpus", "Corpus"), ("machine", "Machine"))
    ]
    return "".join(tables)


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys; other values as JSON, strings bare, whole numbers with
    separators left out.
    """
    if not isinstance(values, dict):
        return {
            prefix: values
            if isinstance(values, str)
            else json.dumps(values, ensure_ascii=False, default=str)
        }
    if not values and prefix:
        return {prefix: "{}"}
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _wall(run: Run) -> float:
    wall = number(run.summary.get("wall_seconds"))
    return wall if math.isfinite(wall) else float(run.seconds[-1]) if run.training else math.nan
