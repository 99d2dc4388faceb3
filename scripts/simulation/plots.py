"""Pictures of the time model: what a reduction depends on, and the scale-out curve.

Needs matplotlib, imported when drawn.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Tuple

import numpy as np

from pangu_locmoe.config import Config
from pangu_locmoe.report.pictures import GRID, INK, SOFT, save, style
from pangu_locmoe.report.pictures import ROUTERS as COLOUR_OF
from pangu_locmoe.simulate.devices import Device
from pangu_locmoe.simulate.model import Assumptions, simulate
from pangu_locmoe.simulate.routing import Routing
from simulation.paper import PAPER_REDUCTIONS, changed, reductions

ROUTERS = ("hash", "switch", "locmoe")
SCALE_NODES = (16, 32, 64, 128, 256, 512, 1024, 1248)  # 8 NPUs each; groups of 16 nodes

Case = Tuple[Config, Device, Assumptions]


def sensitivity_cases(
    config: Config, device: Device, assumed: Assumptions
) -> Iterator[Tuple[str, str, Case, str, Case]]:
    """Name, and for a low and a high value its label and what to simulate."""

    def link(factor: float) -> Case:
        return (
            config,
            dataclasses.replace(device, node_bandwidth=device.node_bandwidth * factor),
            assumed,
        )

    def routed(router: str, routing: Routing) -> Case:
        return (
            config,
            device,
            dataclasses.replace(assumed, routing={**assumed.routing, router: routing}),
        )

    def factor(value: float) -> Case:
        return changed(config, factor=value), device, assumed

    def tensor(scale: float) -> Case:
        return (
            config,
            dataclasses.replace(device, intra_bandwidth=device.intra_bandwidth * scale),
            assumed,
        )

    yield (
        "local fraction of locmoe",
        "0.5",
        routed("locmoe", Routing(0.5, 1.1)),
        "1",
        routed("locmoe", Routing(1.0, 1.1)),
    )
    yield "links between nodes", "x 2", link(2), "x 0.5", link(0.5)
    yield (
        "fullest expert of switch, x mean",
        "1.2",
        routed("switch", Routing(None, 1.2)),
        "2",
        routed("switch", Routing(None, 2.0)),
    )
    yield (
        "fullest expert of locmoe, x mean",
        "1.4",
        routed("locmoe", Routing(0.9, 1.4)),
        "1",
        routed("locmoe", Routing(0.9, 1.0)),
    )
    yield "capacity factor", "1", factor(1.0), "2", factor(2.0)
    yield "links inside the node", "x 0.5", tensor(0.5), "x 3", tensor(3)


def sensitivity(
    config: Config, device: Device, assumed: Assumptions, nodes: int = 8
) -> Tuple[Dict[str, float], List[Tuple[str, Tuple[str, str], Dict[str, Tuple[float, float]]]]]:
    """locmoe's reductions as assumed, and for each assumption at its low and high value."""

    def against(case: Case) -> Dict[str, float]:
        rows = simulate(case[0], [nodes], ROUTERS, case[1], assumptions=case[2]).rows
        return {router: values[nodes] for router, values in reductions(rows).items()}

    found = []
    for name, low, low_case, high, high_case in sensitivity_cases(config, device, assumed):
        lows = against(low_case)
        highs = against(high_case)
        found.append(
            (name, (low, high), {router: (lows[router], highs[router]) for router in lows})
        )
    return against((config, device, assumed)), found


def plot_sensitivity(config: Config, device: Device, assumed: Assumptions, path: Path) -> None:
    """What locmoe's reductions at 8 nodes become when one assumption changes. Raises OSError."""
    base, found = sensitivity(config, device, assumed)

    def draw(axes: Sequence[Any]) -> None:
        for panel, router in zip(axes, ("hash", "switch")):
            for position, (_, labels, values) in enumerate(reversed(found)):
                low, high = values[router]
                panel.barh(
                    position,
                    100 * (high - low),
                    left=100 * low,
                    color=COLOUR_OF[router],
                    height=0.5,
                )
                for value, label, side in zip((low, high), labels, ("right", "left")):
                    panel.annotate(
                        label,
                        (100 * value, position),
                        (-4 if side == "right" else 4, 0),
                        textcoords="offset points",
                        va="center",
                        ha=side,
                        color=SOFT,
                        fontsize=8,
                    )
            panel.axvline(100 * base[router], color=INK, linewidth=1)
            panel.axvline(
                100 * PAPER_REDUCTIONS[router], color="#c2334d", linewidth=1, linestyle="--"
            )
            panel.set_yticks(range(len(found)), [name for name, _, _ in reversed(found)])
            panel.set_title(
                f"locmoe's step against {router}'s, 64 NPUs", loc="left", fontsize=10, color=INK
            )
            panel.set_xlabel("% shorter (line: as assumed; dashed: the paper)")
            panel.use_sticky_edges = False
            panel.margins(x=0.15)
            _frame(panel, "x")

    _save(path, "sensitivity", (9.6, 3.4), draw, sharey=True)


def scale_curves(
    config: Config, device: Device, assumed: Assumptions
) -> Dict[str, Dict[int, Tuple[float, float]]]:
    """Tokens per second and NPU, and the exchange's share, of each curve by NPUs."""
    curves: Dict[str, Dict[int, Tuple[float, float]]] = {}

    def add(name: str, router: str, nodes: int, case: Case) -> None:
        row = simulate(case[0], [nodes], [router], case[1], assumptions=case[2]).rows[0]
        curves.setdefault(name, {})[row.ranks] = (
            row.to_dict()["tokens_per_second"] / row.ranks,
            row.step.exchange_share,
        )

    for nodes in SCALE_NODES:
        for router in ("hash", "locmoe"):
            add(
                f"{router}, groups of 16 nodes repeat",
                router,
                nodes,
                (config, device, dataclasses.replace(assumed, copies=True)),
            )
            add(
                f"{router}, one copy on 16 nodes",
                router,
                nodes,
                (config, device, dataclasses.replace(assumed, copies=False)),
            )
            more = config.model_copy(
                update={"moe": config.moe.model_copy(update={"num_experts": nodes})}
            )
            add(
                f"{router}, an expert for every node",
                router,
                nodes,
                (more, device, dataclasses.replace(assumed, copies=True, expert_parallel=nodes)),
            )
    return curves


def plot_scale(config: Config, device: Device, assumed: Assumptions, path: Path) -> None:
    """Throughput of one NPU and the exchange's share, up to 9,984 NPUs. Raises OSError."""
    curves = scale_curves(config, device, assumed)
    styles = {
        "groups of 16 nodes repeat": "-",
        "an expert for every node": "--",
        "one copy on 16 nodes": ":",
    }

    def draw(axes: Sequence[Any]) -> None:
        first = max(points[128][0] for points in curves.values())
        for name, points in curves.items():
            router, _, layout = name.partition(", ")
            style: Mapping[str, Any] = {
                "color": COLOUR_OF[router],
                "linestyle": styles[layout],
                "linewidth": 1.4,
                "label": name,
            }
            ranks = np.array(list(points))
            axes[0].plot(ranks, [100 * speed / first for speed, _ in points.values()], **style)
            axes[1].plot(ranks, [100 * share for _, share in points.values()], **style)
        for panel, title in zip(
            axes, ("tokens/s of one NPU, % of the best at 128", "exchange, % of the step")
        ):
            panel.set_xscale("log")
            panel.set_xticks([128, 512, 2048, 9984], ["128", "512", "2,048", "9,984"])
            panel.minorticks_off()
            panel.set_ylim(0, 105)
            panel.set_xlabel("NPUs")
            panel.set_title(title, loc="left", fontsize=10, color=INK)
            _frame(panel, "y")
        axes[0].legend(frameon=False, fontsize=7.5, loc="lower left")

    _save(path, "scale", (9.6, 3.8), draw, sharey=False)


def _save(
    path: Path,
    salt: str,
    size: Tuple[float, float],
    draw: Callable[[Sequence[Any]], None],
    sharey: bool,
) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style(salt)):
        figure = Figure(size, layout="constrained")
        draw(figure.subplots(1, 2, sharey=sharey))
        save(figure, path)


def _frame(axes: Any, grid: str) -> None:
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
