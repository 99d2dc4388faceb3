"""From a load trace to a placement plan: `python scripts/examples/trace_and_place.py [TRACE
[PLAN.json]]`.

TRACE is a run directory or an .npz with the nodes that tokens come from; without it a trace is made
up. NumPy only.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pangu_locmoe.expert_load.forecast import forecast
from pangu_locmoe.expert_load.placement import Costs, place_trace, save_plan
from pangu_locmoe.expert_load.state import states
from pangu_locmoe.expert_load.trace import Trace, read_trace, write_trace


def made_up_trace(path: Path) -> Path:
    """300 steps, 2 layers, 2 nodes, 8 experts; each node likes experts that are not its own."""
    likes_NE = np.array([[1, 1, 1, 1, 6, 5, 4, 3], [3, 4, 5, 6, 1, 1, 1, 1]]) / 22
    draw = np.random.default_rng(1)
    tokens = [draw.multinomial(2048, likes_E, size=(300, 2)) for likes_E in likes_NE]
    source = np.stack(tokens, axis=2)
    write_trace(path, Trace(np.arange(1, 301), source.sum(axis=2), None, source))
    return path


def stable_layers(past: Trace) -> Sequence[int | None]:
    return states(past).layers_stable_from


def main(arguments: list[str]) -> None:
    work = Path(tempfile.mkdtemp(prefix="trace-and-place-"))
    trace = read_trace(Path(arguments[0]) if arguments else made_up_trace(work / "load.npz"))
    print(states(trace).format())  # a layer that is not stable yet keeps its placement below
    origin = int(trace.step_W[-1]) + 1
    coming = forecast(trace, origin, horizon=100)
    print(
        "shares of the first layer in the next 100 steps "
        f"{coming.share_YLE.mean(axis=0)[0].round(3)}"
    )

    costs = Costs.of_model(hidden_size=768, ffn_size=3072, horizon=100)
    plan = place_trace(
        trace, 2, ranks_per_node=2, costs=costs, horizon=100, stable_from=stable_layers
    )
    path = Path(arguments[1]) if len(arguments) > 1 else work / "plan.json"
    save_plan(plan, path)
    print(f"{plan.format()}\n{path}")


if __name__ == "__main__":
    main(sys.argv[1:])
