"""What all pictures have in common that are files of their own: colours, lettering, and how they
are saved.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Dict

from pangu_locmoe.files import write_atomic

SERIES = ("#1f6fc4", "#d2601a", "#12876f", "#8a4bb0", "#b8860b", "#c2334d", "#4f6475", "#5a7d1a")
"""also the report's, in its light form (report/style.py)"""
ROUTERS = dict(zip(("hash", "switch", "locmoe", "locmoe_plus"), SERIES))
OTHER = SERIES[6]
"""of a router that is not the package's"""
INK = "#1b1f24"
SOFT = "#5b6570"
RULE = "#d9dde2"
GRID = "#e9ecef"


def style(salt: str) -> Dict[Any, Any]:
    """Settings for `matplotlib.rc_context`; the same `salt` and content give the same file."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 9,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.edgecolor": RULE,
        "axes.labelcolor": SOFT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
    }


def save(figure: Any, path: Path, dpi: float = 100.0) -> None:
    """Write a figure as SVG, whole or not at all.

    Raises OSError. `dpi` is of what is drawn as pixels in it.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=dpi, metadata={"Date": None})
    write_atomic(path, buffer.getvalue())
