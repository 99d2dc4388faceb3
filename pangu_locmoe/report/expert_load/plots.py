"""A picture of a trace and of what the state rule says about it.

Needs matplotlib, which is imported when it is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pangu_locmoe.expert_load.state import EXIT, States
from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.report.pictures import GRID, INK, SERIES, SOFT, save, style
from pangu_locmoe.report.series import bin_rows, pick, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2  # of panels; inches of one
WIDTH = 4.8
HEIGHT = 3.1
POINTS = 300  # of a line; more cannot be seen
LINES = 200  # beyond, lines are drawn as pixels, or the file would be tens of megabytes


def plot_states(trace: Trace, states: States, path: Path) -> None:
    """Draw an SVG: for each layer all shares over the steps, the transient shaded, and below the
    statistic over its limit.

    Raises OSError if it cannot be written, ImportError without matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    layers = trace.load_WLE.shape[1]
    columns = min(COLUMNS, layers)
    figure = Figure((WIDTH * columns, HEIGHT * -(-layers // columns)), layout="constrained")
    with matplotlib.rc_context(style("states")):
        panels = figure.subfigures(-(-layers // columns), columns, squeeze=False).flat
        for layer, panel in enumerate(list(panels)[:layers]):
            upper, lower = panel.subplots(2, 1, sharex=True, height_ratios=(2, 1))
            _shares(upper, trace, states, layer)
            _statistic(lower, states, layer)
        save(figure, path, dpi=150)


def _shares(axes: Axes, trace: Trace, states: States, layer: int) -> None:
    count_WE = trace.load_WLE[:, layer]
    step_W = np.asarray(trace.step_W, float)
    weight = bin_rows(np.ones(len(step_W)), POINTS)
    middle_W = bin_rows(step_W, POINTS) / weight
    mean_WE = bin_rows(trace.share_WLE[:, layer], POINTS) / weight[:, None]
    pixels = trace.load_WLE[0].size > LINES
    for expert in range(count_WE.shape[1]):
        axes.plot(
            middle_W,
            100 * mean_WE[:, expert],
            color=SERIES[expert % len(SERIES)],
            linewidth=0.6,
            rasterized=pixels,
        )
    begin = states.layers_stable_from[layer]
    if states.known:
        axes.axvspan(
            step_W[0],
            step_W[-1] if begin is None else begin,
            color=SOFT,
            alpha=0.13,
            linewidth=0,
            gid=f"transient-{layer}",
        )
    axes.set_title(f"MoE layer {layer}: {states.says(begin)}", fontsize=10, loc="left", color=INK)
    axes.set_ylabel("% of tokens")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    _frame(axes)


def _statistic(axes: Axes, states: States, layer: int) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    step_W = np.asarray(states.step_W, float)
    statistic_W = states.statistic_WL[:, layer]
    known = np.isfinite(statistic_W)
    axes.plot(
        *pick(*thin(step_W[known], statistic_W[known], POINTS), POINTS),
        color=SERIES[0],
        linewidth=1,
    )
    for limit, line in ((1, "-"), (EXIT, "--")):
        axes.axhline(limit, color=SERIES[5], linewidth=0.8, linestyle=line)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, *(1, 2, 5, 10, 20, 50)]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("statistic / limit")
    _frame(axes)


def _frame(axes: Any) -> None:
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
