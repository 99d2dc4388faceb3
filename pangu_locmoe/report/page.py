"""One self-contained HTML page about one or several runs: no script, no request to anywhere."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pangu_locmoe.data.identity import differences
from pangu_locmoe.errors import DataError
from pangu_locmoe.files import write_atomic
from pangu_locmoe.report.figures import (
    UNIFORM,
    Figure,
    legend_html,
    load_figures,
    locality_figures,
    loss_figures,
    routing_figures,
    speed_figures,
)
from pangu_locmoe.report.run import Run, read_run, table
from pangu_locmoe.report.style import STYLE
from pangu_locmoe.report.tables import (
    capacity_html,
    comparison_html,
    differences_html,
    domains_html,
    experts_html,
    facts_html,
    placement_html,
    tiles_html,
)
from pangu_locmoe.report.time_table import wall_time_html

# The browser enforces what this page promises: inline styles and embedded images, nothing else.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def build_report(run_dirs: list[Path], output: Path) -> Path:
    """Write the report of all `run_dirs` to `output` and return it.

    Raises DataError if there is no run, a directory is not a run, or the page cannot be written.
    """
    if not run_dirs:
        raise DataError("report: give at least one run directory")
    runs = _distinct([read_run(path) for path in run_dirs])
    page = UNPRINTABLE.sub("\ufffd", render(runs))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, page.encode("utf-8"))
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}") from None
    return output


def render(runs: list[Run]) -> str:
    """The page as text. Every word that comes from a run is escaped where it is put in."""
    several = len(runs) > 1
    title = (
        "Comparison of " + ", ".join(run.name for run in runs) if several else f"Run {runs[0].name}"
    )
    names = tuple((run.name, colour) for colour, run in enumerate(runs))
    legend = legend_html(names) if several else ""
    sections = [
        _section("Loss", legend + _figures(loss_figures(runs)) + domains_html(runs)),
        _section(
            "Routing", legend + _figures(routing_figures(runs)) + _bound(runs) + _placement(runs)
        ),
        _section("Expert load", _load(runs)),
        _section("Locality", _under(legend, _figures(locality_figures(runs)))),
        _section("Speed and optimisation", legend + _figures(speed_figures(runs))),
        _section("Where the time went", wall_time_html(runs)),
        _section("Samples", "".join(_samples(run, several) for run in runs)),
        _section("Configuration", "".join(_configuration(run, several) for run in runs)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta '
        'name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" '
        f'href="data:,"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n'
        f"<header><h1>{html.escape(title if not several else 'Comparison of ' + str(len(runs)) + ' runs')}</h1>"
        f"<p>{html.escape(_subtitle(runs))}</p></header>\n{_notes(runs)}\n{_top(runs, legend)}\n<main>"
        + "\n".join(sections)
        + "</main>\n</body></html>\n"
    )


def _distinct(runs: list[Run]) -> list[Run]:
    """Names that tell the runs apart: the directory's, with its parent's where two are alike,
    numbered where even these are.
    """
    named: list[Run] = []
    for run in runs:
        alike = [other for other in runs if other.name == run.name]
        name = run.name if len(alike) == 1 else f"{run.path.resolve().parent.name}/{run.name}"
        count = sum(other.name == name or other.name.startswith(f"{name} (") for other in named)
        named.append(replace(run, name=f"{name} ({count + 1})" if count else name))
    return named


def _subtitle(runs: list[Run]) -> str:
    if len(runs) > 1:
        return "pangu_locmoe, one colour per run throughout the page"
    moe = table(runs[0].config, "moe")
    model = table(runs[0].config, "model")
    layers = (
        f"{model.get('num_layers', '?')} layers, {model.get('num_moe_layers', '?')} of them sparse"
    )
    router = (
        f", router {moe.get('router', '?')}, {moe.get('num_experts', '?')} experts"
        if model.get("num_moe_layers")
        else ""
    )
    return f"pangu_locmoe, {layers}{router}"


def _notes(runs: list[Run]) -> str:
    lines = [
        (f"{run.name}: " if len(runs) > 1 else "") + note for run in runs for note in run.notes
    ]
    lines += [f"{run.name}: no training rows yet" for run in runs if not run.training]
    lines += _other_data(runs)
    return (
        '<div class="notes">' + "".join(f"<p>{html.escape(line)}</p>" for line in lines) + "</div>"
        if lines
        else ""
    )


def _other_data(runs: list[Run]) -> list[str]:
    """What keeps the runs' losses from being compared: data that is not the same, or not known
    to be.
    """
    if len(runs) == 1:
        return []
    lines = [
        f"{run.name}: does not say what data it was trained on, so that it may not be comparable"
        for run in runs
        if run.identity is None
    ]
    known = [(run.name, run.identity) for run in runs if run.identity is not None]
    for name, identity in known[1:]:
        changed = differences(known[0][1], identity)
        if changed:
            lines.append(
                f"{name}: other data than {known[0][0]}, so that their losses cannot be "
                f"compared: {', '.join(changed)} differ"
            )
    return lines


def _top(runs: list[Run], legend: str) -> str:
    if len(runs) == 1:
        return tiles_html(runs[0])
    return (
        f"{legend}{comparison_html(runs)}<section><h2>What differs</h2><p>Keys of the resolved "
        "configurations that are not the same in all "
        f"runs.</p>{differences_html(runs)}</section>"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def _under(legend: str, body: str) -> str:
    return legend + body if "<svg" in body else body


def _figures(figures: list[Figure]) -> str:
    """The figures side by side, and the names of those without data."""
    missing = [figure.title.lower() for figure in figures if figure.svg is None]
    drawn = "".join(figure.html() for figure in figures)
    line = f"<p>Not recorded: {html.escape(', '.join(missing))}.</p>" if missing else ""
    return (f'<div class="figures">{drawn}</div>' if drawn else "") + line


def _bound(runs: list[Run]) -> str:
    return _headed(
        "Capacity bound",
        (
            "The latest measurement of LocMoE’s lower bound; δ is the statistic of the cosines "
            "between tokens and their gate."
        ),
        capacity_html(runs),
    )


def _placement(runs: list[Run]) -> str:
    return _headed(
        "Placement",
        (
            "Plans made while training, for the load that was forecast; where nothing was "
            "worth moving, experts stayed."
        ),
        placement_html(runs),
    )


def _headed(title: str, text: str, body: str) -> str:
    """A part with its heading; nothing without a body."""
    return f"<h3>{title}</h3><p>{text}</p>{body}" if body else ""


def _load(runs: list[Run]) -> str:
    figures_of = load_figures(runs)
    parts = []
    for run in runs:
        figures = figures_of(run)
        if len(runs) > 1:
            parts.append(f"<h3>{html.escape(run.name)}</h3>")
        parts.append(
            _figures(figures)
            if figures
            else "<p>No expert load was traced: no sparse layers, or no load.npz.</p>"
        )
    ends = experts_html(runs)
    intro = f"<p>Share of a layer’s tokens that each expert gets. {UNIFORM}</p>" if ends else ""
    return (
        intro
        + "".join(parts)
        + (f"<h3>At the end of the run{'s' if len(runs) > 1 else ''}</h3>{ends}" if ends else "")
    )


def _samples(run: Run, several: bool) -> str:
    samples = run.summary.get("samples")
    parts = (
        [_sample(sample) for sample in samples if isinstance(sample, dict)]
        if isinstance(samples, list)
        else []
    )
    return (f"<h3>{html.escape(run.name)}</h3>" if several and parts else "") + "".join(parts)


def _sample(sample: dict[str, Any]) -> str:
    domain, prompt, text = (str(sample.get(key) or "") for key in ("domain", "prompt", "text"))
    text = text[len(prompt) :] if prompt and text.startswith(prompt) else text
    return (
        f'<div class="sample"><h3>{html.escape(domain)}</h3><blockquote '
        f'dir="auto"><mark>{html.escape(prompt)}</mark>{html.escape(text)}</blockquote></div>'
    )


def _configuration(run: Run, several: bool) -> str:
    label = f"Resolved configuration of {run.name}" if several else "Resolved configuration"
    facts = facts_html(run)
    return (
        f"<details><summary>{html.escape(label)}</summary><pre>{html.escape(run.config_text)}</pre></details>"
        + (
            (
                f"<details{'' if several else ' open'}><summary>Corpus and "
                f"machine{html.escape(' of ' + run.name) if several else ''}</summary>{facts}</details>"
            )
            if facts
            else ""
        )
    )
