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

    layers = trace.load_KLE.shape[1]
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
    count_KE = trace.load_KLE[:, layer]
    step_K = np.asarray(trace.step_K, float)
    weight = bin_rows(np.ones(len(step_K)), POINTS)
    middle_K = bin_rows(step_K, POINTS) / weight
    mean_KE = bin_rows(trace.share_KLE[:, layer], POINTS) / weight[:, None]
    pixels = trace.load_KLE[0].size > LINES
    for expert in range(count_KE.shape[1]):
        axes.plot(
            middle_K,
            100 * mean_KE[:, expert],
            color=SERIES[expert % len(SERIES)],
            linewidth=0.6,
            rasterized=pixels,
        )
    begin = states.layers_stable_from[layer]
    if states.known:
        axes.axvspan(
            step_K[0],
            step_K[-1] if begin is None else begin,
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

    step_K = np.asarray(states.step_K, float)
    statistic_K = states.statistic_KL[:, layer]
    known = np.isfinite(statistic_K)
    axes.plot(
        *pick(*thin(step_K[known], statistic_K[known], POINTS), POINTS),
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
