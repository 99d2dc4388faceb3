"""The charts of a load report: shares with the transient shaded, the state statistic, tokens that
stay in their node.

They are drawn in the frame of report/plots.py, so that they look like those of a run's report, in
light and in dark. Needs matplotlib.
Letters: W rows, L layers, N nodes, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.expert_load.state import EXIT, States
from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.report.figures import STEP, Figure
from pangu_locmoe.report.plots import (
    COLOURS,
    INK,
    RIGHT,
    Line,
    canvas,
    figure_svg,
    line_chart,
    set_ticks,
)
from pangu_locmoe.report.series import bin_rows, moving_mean, pick, thin

Array = NDArray[Any]

LINES = 64  # of one chart; of more experts those whose share moves most are drawn
LAYERS = 24  # that get a chart of shares
POINTS = 150  # of a line, at most: each the mean of the rows around it, as one row is mostly noise
ALL_POINTS = 100_000  # of all charts of shares together; keeps the page below 3 MB
AVERAGED = (
    100  # rows at most that a local fraction is averaged over: one row is mostly sampling noise
)


def share_figures(trace: Trace, states: States) -> list[Figure]:
    """For each layer every expert's share over the steps, the transient shaded; one layer after
    the other.
    """
    layers, experts = trace.load_WLE.shape[1:]
    drawn = min(layers, LAYERS)
    points = min(POINTS, max(24, ALL_POINTS // (drawn * min(experts, LINES))))
    figures = []
    for layer, begin in enumerate(states.layers_stable_from[:drawn]):
        title = f"MoE layer {layer}: {states.says(begin)}"
        shaded_to = begin if states.known else int(trace.step_W[0])
        svg, left_out = _shares(title, trace, layer, shaded_to, points)
        caption = (
            f"The {LINES} experts whose share moves most; {left_out} are left out."
            if left_out
            else ""
        )
        figures.append(Figure(title, svg, caption))
    return figures


def statistic_figure(states: States) -> Figure:
    """How restless each layer is: the largest statistic of the rule over its limit, on a
    logarithmic scale.
    """
    title = "How restless each layer is"
    known_W = np.isfinite(states.statistic_WL).all(axis=1)
    layers = states.statistic_WL.shape[1]
    if not known_W.any():
        return Figure(title, None)
    step_W = np.asarray(states.step_W[known_W], float)
    statistic_WL = states.statistic_WL[known_W]
    if layers > COLOURS:
        names, statistic_WL = ["the most restless layer"], statistic_WL.max(axis=1, keepdims=True)
    else:
        names = [f"MoE layer {layer}" for layer in range(layers)]
    figure, axes = canvas(186, RIGHT, STEP, "statistic / limit")
    axes.set_yscale("log")
    for limit, dashes in ((1.0, "-"), (EXIT, "--")):
        axes.axhline(limit, color=INK["ink"], linewidth=1, linestyle=dashes, clip_on=False)
    for index in range(len(names)):
        line = thin(step_W, np.maximum(statistic_WL[:, index], 0.1), POINTS)
        axes.plot(*line, color=INK[f"c{index}"], linewidth=1.3, clip_on=False, gid=f"line-{index}")
    _span(axes, step_W)
    _plain_log(axes)
    caption = (
        "Quiet is below the line at 1. A stable layer is transient again above the dashed "
        f"line at {EXIT:g}."
    )
    return Figure(
        title, figure_svg(title, figure, names), caption, tuple(zip(names, range(len(names))))
    )


def local_figure(trace: Trace) -> Figure:
    """The part of each layer's tokens whose expert is in the node they come from, experts being
    where training starts.
    """
    title = "Tokens that stay in their node"
    local_WL = local_fraction(trace)
    if local_WL is None:
        return Figure(title, None)
    rows, layers = local_WL.shape
    window = max(1, min(AVERAGED, rows // 10))
    names = [f"MoE layer {layer}" for layer in range(layers)]
    if layers > COLOURS:
        names, local_WL = ["mean of all layers"], local_WL.mean(axis=1, keepdims=True)
    step_W = np.asarray(trace.step_W, float)
    lines = [
        Line(
            name,
            *pick(
                step_W,
                moving_mean(np.asarray(100 * local_WL[:, index], np.float64), window),
                POINTS,
            ),
            index,
            "line",
        )
        for index, name in enumerate(names)
    ]
    nodes = 0 if trace.source_WLNE is None else trace.source_WLNE.shape[2]
    caption = (
        f"Experts in equal contiguous blocks on {nodes} nodes, as training starts; alike nodes "
        f"would give {100 / nodes:.3g} %."
    )
    mean = f" Moving mean over {window} rows." if window > 1 else ""
    return Figure(
        title,
        line_chart(title, STEP, "% of the layer's tokens", lines),
        caption + mean,
        tuple(zip(names, range(len(names)))),
    )


def local_fraction(trace: Trace) -> Array | None:
    """float [W, L], NaN where a layer had no tokens.

    None where the trace cannot tell: no source, one node, or uneven blocks.
    """
    if trace.source_WLNE is None:
        return None
    nodes, experts = trace.source_WLNE.shape[2:]
    if nodes < 2 or experts % nodes:
        return None
    held = experts // nodes
    local_WL = sum(
        trace.source_WLNE[:, :, node, node * held : (node + 1) * held].sum(axis=2)
        for node in range(nodes)
    )
    all_WL = trace.load_WLE.sum(axis=2)
    return np.asarray(np.where(all_WL > 0, local_WL / np.maximum(all_WL, 1), np.nan))


def _shares(
    title: str, trace: Trace, layer: int, begin: int | None, points: int
) -> tuple[str, int]:
    """The SVG, and how many experts are not in it."""
    one_layer = Trace(trace.step_W, trace.load_WLE[:, layer : layer + 1])
    weight_X = bin_rows(np.ones(len(trace.step_W)), points)
    step_X = bin_rows(np.asarray(trace.step_W, float), points) / weight_X
    share_XE = 100 * bin_rows(one_layer.share_WLE[:, 0], points) / weight_X[:, None]
    shown = np.sort(np.argsort(-np.ptp(share_XE, axis=0), kind="stable")[:LINES])
    figure, axes = canvas(186, RIGHT, STEP, "% of the layer's tokens")
    first = float(trace.step_W[0])
    last = float(trace.step_W[-1])
    axes.axvspan(
        first,
        last if begin is None else begin,
        color=INK["rule"],
        alpha=0.5,
        linewidth=0,
        clip_on=False,
        gid="transient",
    )
    axes.grid(axis="y", color=INK["grid"], linewidth=1, clip_on=False)
    for index, expert in enumerate(shown):
        style: dict[str, Any] = {"marker": "o", "markersize": 4} if len(step_X) == 1 else {}
        axes.plot(
            step_X,
            share_XE[:, expert],
            color=INK[f"c{expert % COLOURS}"],
            linewidth=0.9,
            clip_on=False,
            gid=f"line-{index}",
            **style,
        )
    high = float(share_XE.max())
    axes.set_ylim(0, 1.06 * high if high else 1.0)
    _span(axes, np.array([first, last]))
    set_ticks(axes.yaxis, high, False)
    return figure_svg(title, figure, [f"expert {expert}" for expert in shown]), share_XE.shape[
        1
    ] - len(shown)


def _span(axes: Any, step_W: Array) -> None:
    one = float(step_W[0] == step_W[-1])
    axes.set_xlim(step_W[0] - one, step_W[-1] + one)
    set_ticks(axes.xaxis, float(step_W[-1]), True)


def _plain_log(axes: Any) -> None:
    """0.5, 1, 2 and not powers of ten."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
