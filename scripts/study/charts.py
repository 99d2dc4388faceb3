"""Line charts of several routers, each in one colour. matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from pangu_locmoe.report.pictures import GRID, OTHER, ROUTERS, SOFT, save, style


class Lines:
    """Panels side by side; lines of one name have one colour and one entry in the legend."""

    def __init__(self, panels: int) -> None:
        import matplotlib
        from matplotlib.figure import Figure

        self._style: Dict[Any, Any] = {**style("study"), "axes.grid": True, "grid.color": GRID}
        self._matplotlib = matplotlib
        with matplotlib.rc_context(self._style):
            self._figure = Figure((4.6 * panels, 3.6), layout="constrained")
            self._axes: List[Any] = list(self._figure.subplots(1, panels, squeeze=False)[0])

    def add(
        self,
        panel: int,
        name: str,
        x: Sequence[float],
        y: Sequence[float],
        dashes: str = "-",
        label: str = "",
    ) -> None:
        """A line of the router `name`; `label` where it should be called something else."""
        known = {line.get_label() for line in self._axes[panel].lines}
        text = label or name
        self._axes[panel].plot(
            x,
            y,
            dashes,
            color=ROUTERS.get(name, OTHER),
            linewidth=1.3,
            markersize=4,
            alpha=0.85,
            label=None if text in known else text,
        )

    def mark(self, panel: int, x: float, name: str, text: str) -> None:
        """A vertical line."""
        self._axes[panel].axvline(x, color=ROUTERS.get(name, OTHER), linewidth=1, linestyle=":")
        self._axes[panel].text(
            x,
            0.98,
            f" {text}",
            rotation=90,
            va="top",
            ha="left",
            fontsize=7,
            color=SOFT,
            transform=self._axes[panel].get_xaxis_transform(),
        )

    def save(self, path: Path, labels: List[Tuple[str, str]]) -> None:
        """Write an SVG; `labels` are each panel's x and y."""
        with self._matplotlib.rc_context(self._style):
            for axes, (x, y) in zip(self._axes, labels):
                axes.set_xlabel(x)
                axes.set_ylabel(y)
                axes.spines[["top", "right"]].set_visible(False)
                if axes.get_legend_handles_labels()[1]:
                    axes.legend(fontsize=8, frameon=False)
            save(self._figure, path)
