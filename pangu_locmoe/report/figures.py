"""Which charts a report has.

Each function takes all runs and returns figures; a chart without data is left out and named.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pangu_locmoe.report.plots import COLOURS, Line, heat_map, line_chart, matrix, normalise
from pangu_locmoe.report.run import Run, number, table
from pangu_locmoe.report.series import Floats, tail, window_of

STEP = "optimizer step"
UNIFORM = "The line on the colour bar is the uniform share."
HEAT_PIXELS = 600_000  # of all heat maps of a page together; keeps it below 3 MB


@dataclass(frozen=True)
class Figure:
    """A titled chart. svg is None if no run recorded its data; the legend is drawn if it has two
    names or more.
    """

    title: str
    svg: str | None
    caption: str = ""
    legend: tuple[tuple[str, int], ...] = ()

    def html(self) -> str:
        if self.svg is None:
            return ""
        legend = legend_html(self.legend) if len(self.legend) > 1 else ""
        return f"<figure><figcaption><b>{html.escape(self.title)}</b>{legend}</figcaption>{self.svg}<p>{html.escape(self.caption)}</p></figure>"


def legend_html(names: tuple[tuple[str, int], ...]) -> str:
    """Coloured keys and names, in one line that wraps."""
    return (
        '<span class="legend">'
        + "".join(
            f'<span><i class="c{colour % COLOURS}"></i>{html.escape(name)}</span>'
            for name, colour in names
        )
        + "</span>"
    )


def loss_figures(runs: list[Run]) -> list[Figure]:
    """Cross-entropy against steps and against time, validation bits per byte of each domain."""
    unit, size = _time_unit(runs)
    by_step = []
    by_time = []
    for colour, run in enumerate(runs):
        step_W = run.column("step")
        seconds_W = run.seconds
        loss_W = run.column("cross_entropy")
        step_V, loss_V = _validation(run, "validation_loss")
        by_step += [
            Line(run.name, step_W, loss_W, colour),
            Line(f"{run.name}, validation", step_V, loss_V, colour, "points"),
        ]
        by_time.append(Line(run.name, seconds_W / size, loss_W, colour))
        if len(step_W):
            by_time.append(
                Line(
                    f"{run.name}, validation",
                    np.interp(step_V, step_W, seconds_W) / size,
                    loss_V,
                    colour,
                    "points",
                )
            )
    windows = sorted({window_of(len(run.training)) for run in runs} - {1})
    mean = (
        (
            "moving mean over "
            f"{' to '.join(f'{window:,}' for window in sorted({windows[0], windows[-1]}))} "
            "rows, rows themselves faint; "
        )
        if windows
        else ""
    )
    label = "cross-entropy (nats per token)"
    return [
        Figure(
            "Loss against steps",
            line_chart("Cross-entropy against optimizer steps", STEP, label, by_step),
            f"Line: training, {mean}dots: validation.",
        ),
        Figure(
            "Loss against time",
            line_chart(
                "Cross-entropy against training time",
                f"training time ({unit})",
                label,
                by_time,
                whole_x=False,
            ),
            "The same against the sum of step times; evaluation and checkpoints are not in it.",
        ),
        *_domain_figures(runs),
    ]


def _domain_figures(runs: list[Run]) -> list[Figure]:
    """One run: one chart with a line per domain.

    Several runs: one chart per domain with a line per run.
    """
    key = "bits_per_byte_by_domain"
    label = "bits per byte"
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    overall = [
        Line(run.name, *_validation(run, "bits_per_byte"), colour, "line")
        for colour, run in enumerate(runs)
    ]
    if len(runs) == 1:
        lines = [
            Line(domain, *_validation(runs[0], key, domain), colour, "line")
            for colour, domain in enumerate(domains)
        ]
        chart = line_chart("Validation bits per byte of each domain", STEP, label, lines)
        legend = tuple((domain, colour) for colour, domain in enumerate(domains))
        return [
            Figure(
                "Validation, all domains",
                line_chart("Validation bits per byte", STEP, label, overall),
            ),
            Figure("Validation by domain", chart, legend=legend),
        ]
    figures = [
        Figure(
            "Validation, all domains", line_chart("Validation bits per byte", STEP, label, overall)
        )
    ]
    for domain in domains:
        lines = [
            Line(run.name, *_validation(run, key, domain), colour, "line")
            for colour, run in enumerate(runs)
        ]
        figures.append(
            Figure(
                f"Validation: {domain}",
                line_chart(f"Validation bits per byte, {domain}", STEP, label, lines),
            )
        )
    return figures


def routing_figures(runs: list[Run]) -> list[Figure]:
    """Balance and locality losses, max/mean load, dropped tokens, capacity."""
    added = "With its weight, as it is added: loss = cross-entropy + balance + locality + z-loss."
    several = any(
        np.isfinite(run.column("unrouted_fraction")).any() for run in runs
    )  # experts for a token
    return [
        _metric(runs, "Load-balance loss", "balance_loss", "contribution to the loss", added),
        _metric(runs, "Locality loss", "locality_loss", "contribution to the loss", added),
        _metric(
            runs,
            "Busiest expert",
            "max_over_mean_load",
            "load, max / mean",
            caption="1 would be perfect balance.",
        ),
        _metric(
            runs,
            "Dropped tokens",
            "dropped_fraction",
            "% of routed tokens",
            scale=100,
            from_zero=True,
        ),
        *(
            [
                _metric(
                    runs,
                    "Tokens without an expert",
                    "unrouted_fraction",
                    "% of tokens",
                    scale=100,
                    from_zero=True,
                )
            ]
            if several
            else []
        ),
        _metric(runs, "Expert capacity", "capacity", "tokens per expert", kind="line"),
    ]


def speed_figures(runs: list[Run]) -> list[Figure]:
    """Throughput, learning rate, gradient norm."""
    return [
        _metric(runs, "Throughput", "tokens_per_second", "tokens per second", from_zero=True),
        _metric(runs, "Step time", "step_seconds", "seconds per step", from_zero=True),
        _metric(
            runs, "Learning rate", "learning_rate", "learning rate", from_zero=True, kind="line"
        ),
        _metric(runs, "Gradient norm", "grad_norm", "global norm before clipping", from_zero=True),
    ]


def locality_figures(runs: list[Run]) -> list[Figure]:
    """Local fraction over steps; the source node x expert matrix at the end of each run and
    layer.
    """
    figures = [
        _metric(
            runs,
            "Tokens that stay in their node",
            "local_fraction",
            "% of routed tokens",
            scale=100,
        )
    ]
    for run in runs:
        source_WLNE = run.load.source_WLNE if run.load else None
        if (
            run.load is None
            or source_WLNE is None
            or not source_WLNE.size
            or source_WLNE.shape[2] < 2
        ):
            continue
        rows = tail(len(source_WLNE))
        count_LNE = source_WLNE[-rows:].sum(axis=0)
        nodes, experts = count_LNE.shape[1:]
        top = _top(normalise(count_LNE), experts)
        local = _emulated_nodes(run) == nodes and experts % nodes == 0
        for layer, count_NE in enumerate(count_LNE):
            title = f"Where tokens go, {layer_name(run, layer)}" + (
                f", {run.name}" if len(runs) > 1 else ""
            )
            drawn = matrix(
                title, count_NE, top, "last row" if rows == 1 else f"last {rows} rows", local
            )
            figures.append(
                Figure(
                    title,
                    drawn,
                    ("Outlined: the experts in the same node. " if local else "") + UNIFORM,
                )
            )
    return figures


def _emulated_nodes(run: Run) -> float:
    """Nodes of which each holds a run of experts, as in one process.

    Not said of a job, whose nodes may hold the same ones.
    """
    parallel = table(run.config, "parallel")
    if number(parallel.get("expert_parallel", 1)) != 1:
        return math.nan
    return number(
        parallel.get("nodes", parallel.get("emulated_nodes"))
    )  # runs of older versions have the second


def load_figures(runs: list[Run]) -> Callable[[Run], list[Figure]]:
    """A function that draws one run's heat maps, at a resolution common to all runs, on a colour
    scale common to runs of as many experts.
    """
    traced = [run.load.load_WLE for run in runs if run.load is not None and run.load.load_WLE.size]
    lines = sum(load_WLE.shape[1] * load_WLE.shape[2] for load_WLE in traced)
    most = int(min(240, max(24, HEAT_PIXELS // max(lines, 1))))
    tops: dict[int, float] = {}
    for load_WLE in traced:
        experts = load_WLE.shape[2]
        tops[experts] = max(
            tops.get(experts, 0.0),
            _top(normalise(load_WLE[:: max(1, len(load_WLE) // 2000)]), experts),
        )

    def figures(run: Run) -> list[Figure]:
        if run.load is None or not run.load.load_WLE.size:
            return []
        load_WLE = run.load.load_WLE
        step_W = run.load.step_W.astype(np.float64)
        names = [layer_name(run, layer) for layer in range(load_WLE.shape[1])]
        maps = (
            heat_map(
                f"Expert load, {run.name}, {name}",
                load_WLE[:, layer],
                step_W,
                tops[load_WLE.shape[2]],
                most,
            )
            for layer, name in enumerate(names)
        )
        return [Figure(f"Share of tokens, {name}", drawn) for name, drawn in zip(names, maps)]

    return figures


def _metric(
    runs: list[Run],
    title: str,
    key: str,
    unit: str,
    caption: str = "",
    scale: float = 1,
    from_zero: bool = False,
    kind: str = "noisy",
) -> Figure:
    lines = [
        Line(run.name, run.column("step"), run.column(key) * scale, colour, kind)
        for colour, run in enumerate(runs)
    ]
    return Figure(title, line_chart(title, STEP, unit, lines, from_zero), caption)


def _validation(run: Run, key: str, domain: str | None = None) -> tuple[Floats, Floats]:
    values = [
        number(row.get(key) if domain is None else table(row, key).get(domain))
        for row in run.validation
    ]
    return np.array([number(row["step"]) for row in run.validation]), np.array(values)


def layer_name(run: Run, index: int) -> str:
    """The decoder layer (from 0) behind the index-th sparse layer, if the configuration tells
    it: the top ones below the query layer.
    """
    assert run.load is not None
    layers, sparse = (
        number(table(run.config, "model").get(key)) for key in ("num_layers", "num_moe_layers")
    )
    if sparse == run.load.load_WLE.shape[1] and layers > sparse:
        return f"layer {int(layers - 1 - sparse) + index}"
    return f"MoE layer {index}"


def _top(share_XE: Floats, experts: int) -> float:
    """Upper end of a colour scale: all but the top 1 % of shares are inside it, and twice the
    uniform share always is.
    """
    finite = share_XE[np.isfinite(share_XE)]
    high = float(np.quantile(finite, 0.99)) if len(finite) else 0.0
    return min(1.0, max(2 / experts, high)) if experts > 1 else 1.0


def _time_unit(runs: list[Run]) -> tuple[str, float]:
    longest = max((float(run.seconds[-1]) for run in runs if len(run.seconds)), default=0.0)
    return (
        ("hours", 3600.0)
        if longest > 3 * 3600
        else ("minutes", 60.0)
        if longest > 300
        else ("seconds", 1.0)
    )
