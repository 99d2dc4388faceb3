"""One self-contained HTML page about a load trace: what it is, shares, states, errors of the
forecasts, locality. No MindSpore.
"""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.state import EXIT, TRANSIENT, States, states
from pangu_locmoe.expert_load.trace import Trace, read_trace
from pangu_locmoe.files import write_atomic
from pangu_locmoe.report.expert_load.charts import (
    LAYERS,
    local_figure,
    share_figures,
    statistic_figure,
)
from pangu_locmoe.report.expert_load.errors import errors_html, rolling_cases
from pangu_locmoe.report.figures import Figure
from pangu_locmoe.report.page import POLICY, UNPRINTABLE
from pangu_locmoe.report.series import percent, tail, text
from pangu_locmoe.report.style import STYLE
from pangu_locmoe.report.tables import DASH, table_html


def build_load_report(trace_file: Path, output: Path) -> Path:
    """Write the page about the trace in `trace_file`, a load.npz, to `output` and return it; whole
    or not at all.

    Raises DataError in one line if the file is not a trace or the page cannot be written.
    """
    page = UNPRINTABLE.sub("\ufffd", render(read_trace(trace_file), _name(trace_file)))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, page.encode("utf-8"))
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror or error}") from None
    return output


def render(trace: Trace, name: str) -> str:
    """The page as text. `name` is escaped."""
    found = states(trace)
    cases = rolling_cases(trace, found.stable_from, found.known)
    title = html.escape(f"Expert load of {name}")
    sections = (
        ("Shares", _shares(trace, found)),
        ("States", _states(trace, found)),
        ("Forecasts", errors_html(cases, trace, _end(found))),
        ("Locality", _locality(trace)),
    )
    body = "\n".join(f"<section><h2>{head}</h2>{content}</section>" for head, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta '
        'name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" '
        f'href="data:,"><title>{title}</title><style>{STYLE}</style></head><body>\n'
        f"<header><h1>{title}</h1><p>{html.escape(_subtitle(trace))}</p></header>\n{_notes(trace, found)}\n{_tiles(trace, found)}\n"
        f"<main>{body}</main>\n</body></html>\n"
    )


def _name(trace_file: Path) -> str:
    """A run's trace is called load.npz: its directory says more."""
    return trace_file.resolve().parent.name if trace_file.name == "load.npz" else trace_file.name


def _subtitle(trace: Trace) -> str:
    layers, experts = trace.load_WLE.shape[1:]
    return (
        f"pangu_locmoe, load trace: {_count(len(trace.step_W), 'row')}, "
        f"{_count(layers, 'sparse layer')}, {_count(experts, 'expert')} each"
    )


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _notes(trace: Trace, found: States) -> str:
    """What the page cannot show, and why."""
    lines = []
    if not found.known:
        lines.append(
            f"States: {_count(len(trace.step_W), 'row')} cannot tell, the rule needs "
            f"{found.needed}; nothing is known of the load's stability."
        )
    if trace.source_WLNE is None:
        lines.append("Locality: the trace does not say which node tokens come from (no source).")
    if (np.diff(trace.step_W) != trace.stride).any():
        lines.append(
            f"Steps: the rows are not evenly spaced; {trace.stride:,} is the median distance."
        )
    if trace.load_WLE.shape[1] > LAYERS:
        lines.append(f"Shares: the first {LAYERS} of {trace.load_WLE.shape[1]} layers are drawn.")
    return (
        '<div class="notes">' + "".join(f"<p>{html.escape(line)}</p>" for line in lines) + "</div>"
        if lines
        else ""
    )


def _tiles(trace: Trace, found: States) -> str:
    rows, layers, experts = trace.load_WLE.shape
    tokens_WL = trace.load_WLE.sum(axis=2)
    low = float(tokens_WL.min())
    high = float(tokens_WL.max())
    spread = "in every step and layer" if low == high else f"median; {text(low)} to {text(high)}"
    dropped = (
        float(trace.dropped_WLE.sum() / max(1, tokens_WL.sum()))
        if trace.dropped_WLE is not None
        else np.nan
    )
    nodes = (
        "not recorded" if trace.source_WLNE is None else _count(trace.source_WLNE.shape[2], "node")
    )
    tiles = (
        (
            "Rows",
            f"{rows:,}",
            "one each step" if found.stride == 1 else f"one every {found.stride:,} steps",
        ),
        (
            "Steps",
            f"{trace.step_W[0]:,} – {trace.step_W[-1]:,}" if rows > 1 else f"{trace.step_W[0]:,}",
            "first and last" if rows > 1 else "the only one",
        ),
        (
            "Experts",
            f"{experts:,}",
            f"in {_count(layers, 'sparse layer')}; a mean share is {percent(1 / experts)}",
        ),
        ("Tokens per step", text(float(np.median(tokens_WL))), f"of a layer, {spread}"),
        ("Sources", nodes, "where tokens come from"),
        (
            "Dropped tokens",
            percent(dropped),
            "of all" if trace.dropped_WLE is not None else "not recorded",
        ),
        (
            "Stable from",
            DASH if found.stable_from is None else f"{found.stable_from:,}",
            _end(found) if found.stable_from is None else "step, all layers",
        ),
    )
    cells = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}<small>{html.escape(says)}</small></dd></div>"
        for name, value, says in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _end(found: States) -> str:
    """The model's state at the end of the trace, in words."""
    return found.says(found.stable_from) + (" at the last step" if found.state == TRANSIENT else "")


def _shares(trace: Trace, found: States) -> str:
    intro = (
        "<p>Each expert’s share of its layer’s tokens. The transient, as the rule below dates "
        "it, is shaded.</p>"
    )
    return intro + _figures(share_figures(trace, found))


def _states(trace: Trace, found: States) -> str:
    rule = (
        f"<p>A layer is stable once {found.hold} windows of {found.window} rows in a row "
        "move by no more than their own step-to-step noise explains plus "
        f"{100 * found.tolerance:g} % of a share, in variance, drift and range, and while "
        "neighbouring rows are alike. It is transient again when one of these "
        f"exceeds {EXIT:g} times its limit or the noise itself changes.</p>"
    )
    last = tail(len(trace.step_W))
    recent_LE = trace.load_WLE[-last:].sum(axis=0)
    lines = []
    for layer, begin in enumerate(found.layers_stable_from):
        load_E = recent_LE[layer]
        total = max(1, int(load_E.sum()))
        never = int((trace.load_WLE[:, layer].sum(axis=0) == 0).sum())
        since = DASH if begin is None else f"{begin:,}"
        numbers = [
            text(load_E.max() / max(load_E.mean(), 1e-9), 3),
            percent(load_E.max() / total),
            percent(load_E.min() / total),
            str(never),
        ]
        lines.append([f"MoE layer {layer}", found.layer_states[layer], since, *numbers])
    ends = (
        f"<p>The model: {_end(found)}. Loads are those of the last {_count(last, 'row')}.</p>"
        if last > 1
        else f"<p>The model: {_end(found)}. Loads are those of the last row.</p>"
    )
    header = [
        "Layer",
        "State at the end",
        "Stable from step",
        "Max / mean",
        "Largest share",
        "Smallest share",
        "Experts never used",
    ]
    return (
        rule
        + ends
        + table_html(header, lines)
        + _figures([statistic_figure(found)], "no window is full yet")
    )


def _locality(trace: Trace) -> str:
    if trace.source_WLNE is None:
        return "<p>Not recorded: the trace has no <code>source</code>.</p>"
    nodes, experts = trace.source_WLNE.shape[2:]
    reason = (
        "there is one node"
        if nodes == 1
        else (
            f"{nodes} nodes do not divide {experts} experts, so the trace cannot tell where "
            "they are"
        )
    )
    note = (
        "<p>The trace does not know of experts that moved while training: it counts from where "
        "they begin.</p>"
    )
    return _figures([local_figure(trace)], reason) + (
        note if nodes > 1 and experts % nodes == 0 else ""
    )


def _figures(figures: list[Figure], why_not: str = "") -> str:
    missing = [figure.title.lower() for figure in figures if figure.svg is None]
    drawn = "".join(figure.html() for figure in figures)
    line = (
        f"<p>Not shown: {html.escape(', '.join(missing))}: {html.escape(why_not)}.</p>"
        if missing
        else ""
    )
    return (f'<div class="figures">{drawn}</div>' if drawn else "") + line
