"""Line charts and heat maps by matplotlib, as SVG that takes its colours and its font from the
page, so one page serves light and dark.
"""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from pangu_locmoe.report.series import (
    Floats,
    bin_rows,
    moving_mean,
    percent,
    pick,
    text,
    thin,
    window_of,
)

COLOURS = 8  # variables --c0..--c7 of the page's style sheet
# matplotlib wants colours, the page has CSS variables: each gets a colour that nothing else has,
# and is put in its place at the end.
INK = {
    name: f"#fe00{index:02x}"
    for index, name in enumerate(
        [*(f"c{c}" for c in range(COLOURS)), "rule", "grid", "page", "ink"]
    )
}
_LIGHT = "#ffffff"  # on the heat map, whose colours are the same on both pages
_DARK = "#10221c"
_SCALE = matplotlib.colormaps["viridis"].resampled(
    128
)  # tells colour-blind eyes apart, reads on white and on black
# A chart is WIDTH points wide, one CSS pixel each; the drawing leaves room for tick labels, and on
# the right for a colour bar.
WIDTH = 480
LEFT = 50
RIGHT = 14
TOP = 26
BOTTOM = 40
BAR = 74


@dataclass(frozen=True)
class Line:
    """One series. kind: `noisy` draws every row faintly under a moving mean, `line` a plain
    line, `points` dots only.
    """

    label: str
    x: Floats
    y: Floats
    colour: int = 0
    kind: str = "noisy"


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: list[Line],
    from_zero: bool = False,
    whole_x: bool = True,
) -> str | None:
    """An SVG of all lines, or None if none has a finite value."""
    lines = [_finite(line) for line in lines]
    every_x, every_y = (
        np.concatenate([np.empty(0), *values])
        for values in ([line.x for line in lines], [line.y for line in lines])
    )
    every_y = every_y[np.isfinite(every_y)]
    if not len(every_y):
        return None
    low, high, cut = _y_range(every_y, from_zero)
    figure, axes = canvas(
        186, RIGHT, x_label, y_label + (f" (peak of {text(cut, 3)} cut)" if cut else "")
    )
    x_low = float(every_x.min())
    x_high = float(every_x.max())
    one = float(x_low == x_high)
    axes.set(xlim=(x_low - one, x_high + one), ylim=(low, high))
    axes.grid(axis="y", color=INK["grid"], linewidth=1, clip_on=False)
    set_ticks(axes.xaxis, x_high, whole_x)
    set_ticks(axes.yaxis, high, False)
    for index, line in enumerate(lines):
        _draw(axes, line, high, f"line-{index}")
    return figure_svg(title, figure, [line.label for line in lines])


def heat_map(title: str, share_WE: Floats, step_W: Floats, top: float, most: int) -> str | None:
    """Steps on x, experts on y, colour the share of the layer's tokens; rows of `share_WE` are
    counts or shares.

    The colour bar runs from 0 to `top` and marks the uniform share; at most `most` columns are
    drawn.
    """
    experts = share_WE.shape[1]
    if not share_WE.size:
        return None
    figure, axes = canvas(min(max(14 * experts, 96), 224), BAR, "optimizer step", "expert")
    low = float(step_W[0])
    high = float(step_W[-1])
    extent = (low, high if high > low else low + 1, experts - 0.5, -0.5)
    _image(figure, axes, normalise(bin_rows(share_WE, most)).T, top, experts, extent)
    axes.set_yticks(range(0, experts, -(-experts // 16)))
    set_ticks(axes.xaxis, high, True)
    return figure_svg(title, figure)


def matrix(title: str, count_NE: Floats, top: float, rows: str, local: bool) -> str | None:
    """Source nodes on y, experts on x, colour the share of a node's tokens; the shares are written
    in if there is room.

    `rows` says over which rows of the trace the counts are summed. `local` outlines the experts
    that a node holds itself: the experts are dealt to the nodes in equal contiguous blocks.
    """
    nodes, experts = count_NE.shape
    if not count_NE.size:
        return None
    share_NE = normalise(count_NE)
    figure, axes = canvas(
        min(max(26 * nodes, 78), 240),
        BAR,
        f"expert (% of the node’s tokens, {rows})",
        "source node",
    )
    _image(figure, axes, share_NE, top, experts, (-0.5, experts - 0.5, nodes - 0.5, -0.5))
    axes.set_xticks(range(0, experts, -(-experts // 16)))
    axes.set_yticks(range(0, nodes, -(-nodes // 16)))
    if experts <= 16 and nodes <= 10:
        for (node, expert), share in np.ndenumerate(share_NE):
            if np.isfinite(share):
                ink = _DARK if share > 0.62 * top else _LIGHT
                axes.text(
                    expert, node, f"{100 * share:.0f}", ha="center", va="center_baseline", color=ink
                )
    held = experts / nodes
    edge = [withStroke(linewidth=4, foreground=_DARK)]
    for node in range(nodes if local else 0):
        corner = (node * held - 0.5, node - 0.5)
        axes.add_patch(
            Rectangle(
                corner,
                held,
                1,
                fill=False,
                ec=_LIGHT,
                lw=1.8,
                joinstyle="round",
                path_effects=edge,
                clip_on=False,
            )
        )
    return figure_svg(title, figure)


def normalise(count_XE: NDArray[Any]) -> Floats:
    """Rows as shares of their sum; NaN where a row has no tokens."""
    total_X1 = count_XE.sum(axis=-1, keepdims=True).astype(np.float64)
    return np.where(total_X1 > 0, count_XE / np.where(total_X1 > 0, total_X1, 1), np.nan)


def canvas(height: float, right: float, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A drawing `height` points high, whose y title stands above its axis, so that it reads
    level.
    """
    total = TOP + height + BOTTOM
    figure = Figure((WIDTH / 72, total / 72))
    axes = figure.add_axes(
        (LEFT / WIDTH, BOTTOM / total, (WIDTH - LEFT - right) / WIDTH, height / total)
    )
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(INK["rule"])
    axes.tick_params(axis="x", color=INK["rule"])
    axes.tick_params(axis="y", length=0, pad=6)
    axes.set_xlabel(x_label, labelpad=6)
    figure.text(2 / WIDTH, 1 - 12 / total, y_label)
    return figure, axes


def _image(
    figure: Figure,
    axes: Axes,
    share_YX: Floats,
    top: float,
    experts: int,
    extent: tuple[float, float, float, float],
) -> None:
    """Shares as one pixel each, NaN transparent, and a colour bar from 0 to `top` with a line at
    the uniform share.
    """
    image = axes.imshow(
        share_YX,
        _SCALE,
        vmin=0,
        vmax=top,
        aspect="auto",
        interpolation="none",
        extent=extent,
        clip_on=False,
    )
    frame = axes.get_position()
    side = figure.add_axes((1 - (BAR - 12) / WIDTH, frame.y0, 10 / WIDTH, frame.height))
    bar = figure.colorbar(image, cax=side)
    assert bar.solids is not None
    bar.solids.set(rasterized=True, clip_on=False)
    bar.outline.set_visible(False)
    side.patch.set_visible(False)
    side.axhline(1 / experts, -0.2, 1.2, color=INK["ink"], linewidth=1.5, clip_on=False)
    over = "≥ " if np.nanmax(share_YX, initial=0.0) > top * 1.0001 else ""
    marks = {0.0: "0", 1 / experts: percent(1 / experts), top: over + percent(top)}
    if figure.get_figheight() * 72 * frame.height / experts < 13 * top:
        del marks[0.0]  # no room for both
    bar.set_ticks(list(marks), labels=list(marks.values()))
    side.tick_params(length=0, pad=5)


def set_ticks(axis: Axis, high: float, whole: bool) -> None:
    """About six round ticks for values up to `high`; `whole`: no fractions."""
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=whole))
    axis.set_major_formatter(
        EngFormatter(sep="") if high >= 10_000 else StrMethodFormatter("{x:,.6g}")
    )


def _finite(line: Line) -> Line:
    """Without points that have no x; infinite y become gaps."""
    ok = np.isfinite(line.x)
    return replace(line, x=line.x[ok], y=np.where(np.isfinite(line.y), line.y, np.nan)[ok])


def _y_range(values: Floats, from_zero: bool) -> tuple[float, float, float | None]:
    """The visible range, and the highest value if it is a lone spike that is cut off to keep the
    rest readable.
    """
    low = float(values.min())
    high = float(values.max())
    cut = None
    usual = float(np.quantile(values, 0.99)) if len(values) > 50 else high
    if high > low + 3 * (usual - low) > low:
        high, cut = usual + 0.25 * (usual - low), high
    if from_zero:
        low = min(low, 0.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - room), high + room, cut


def _draw(axes: Axes, line: Line, high: float, name: str) -> None:
    """The line, thinned; values above the axis run along its upper edge.

    `name` becomes the id of its group in the SVG.
    """
    colour = INK[f"c{line.colour % COLOURS}"]
    window = window_of(len(line.x)) if line.kind == "noisy" else 1
    dots: dict[str, Any] = {
        "marker": "o",
        "markersize": 6,
        "markeredgecolor": INK["page"],
        "markeredgewidth": 1.2,
    }

    def plot(x: Floats, y: Floats, **style: Any) -> None:
        axes.plot(
            x, np.minimum(y, high), color=colour, solid_capstyle="round", clip_on=False, **style
        )

    if line.kind == "points":
        plot(*pick(line.x, line.y, 60), gid=name, linestyle="", **dots)
    elif window == 1:
        x, y = thin(line.x, line.y, 400)
        gap = np.isnan(np.concatenate([[np.nan], y, [np.nan]]))
        marked = (
            np.isfinite(y)
            if line.kind == "line" and len(y) <= 60
            else gap[:-2] & gap[2:] & ~gap[1:-1]
        )
        plot(
            x, y, gid=name, linewidth=1.7, markevery=np.flatnonzero(marked).tolist(), **dots
        )  # a point between two gaps shows as a dot
    else:
        plot(*thin(line.x, line.y, 400), linewidth=1, alpha=0.28)
        inside = np.where(
            line.y <= high, line.y, np.nan
        )  # a spike that is cut off must not lift its whole window
        plot(*pick(line.x, moving_mean(inside, window), 240), gid=name, linewidth=1.7)


def figure_svg(title: str, figure: Figure, labels: list[str] | None = None) -> str:
    """The figure as an element of the page.

    The group `line-<index>` gets labels[index] as its tooltip.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": ascii(title)}
    ):  # the salt makes ids unique in the page
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("viewBox") :]
    svg = re.sub(
        r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL
    )  # would style the whole page
    svg = re.sub(r"font(-[a-z]+)?: [^;\"<]*(; |(?=\"))", "", svg)
    for name, colour in INK.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(
        r'<g id="line-(\d+)">',
        lambda m: f"<g><title>{html.escape((labels or [])[int(m[1])])}</title>",
        svg,
    )
    svg = re.sub(
        r'<g id="[^"]*"', "<g", svg
    )  # these ids are the same in every figure, and nothing refers to them
    return f'<svg role="img" aria-label="{html.escape(title, quote=True)}" {svg.strip()}'
