"""From a serving engine's dump of expert loads to the placement that it starts with next time:
`python scripts/examples/serving_trace.py [DUMP [PLACEMENT [FORMAT]]]`.

DUMP is a file that `pangu-locmoe load import` takes; without it one of vLLM is made up. FORMAT is
sglang (an argument of --init-expert-location), vllm-ascend (expert_map.json) or eplb. NumPy only.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from pangu_locmoe.expert_load.importing import import_trace
from pangu_locmoe.expert_load.placement import Costs, load_placement, place_trace, save_placement


def made_up_dump(path: Path) -> Path:
    """Two layers of 8 experts, of which experts 0 to 3 have a second slot; 20 snapshots."""
    draw = np.random.default_rng(1)
    expert_of_slot_LP = [[*range(8), *range(4)]] * 2
    likes_LP = draw.dirichlet(np.ones(12), size=2)
    snapshots = [
        {
            "step": step,
            "window_expert_load": [
                draw.multinomial(9000, likes_P).tolist() for likes_P in likes_LP
            ],
            "physical_to_logical_map": expert_of_slot_LP,
        }
        for step in range(100, 2100, 100)
    ]
    content = {"num_logical_experts": 8, "window_size": 100, "snapshots": snapshots}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def main(arguments: list[str]) -> None:
    work = Path(tempfile.mkdtemp(prefix="serving-trace-"))
    dump = Path(arguments[0]) if arguments else made_up_dump(work / "expert_load.json")
    placement = Path(arguments[1]) if len(arguments) > 1 else work / "expert_map.json"
    format = arguments[2] if len(arguments) > 2 else "vllm-ascend"

    trace = import_trace(dump)
    rows, layers, experts = trace.load_WLE.shape
    print(f"{dump.name}: {rows} rows, {layers} layers, {experts} experts")

    # One node of 4 ranks with a spare slot on each: no dump says which node tokens come from, so
    # balance is all that can be gained.
    costs = Costs.of_model(hidden_size=4096, ffn_size=1536, horizon=1000)
    plan = place_trace(
        trace,
        nodes=1,
        ranks_per_node=4,
        costs=costs,
        policy="eplb",
        copies=4,
        one_copy_per_rank=format == "vllm-ascend",
    )
    save_placement(plan, placement, format)
    print(
        f"max/mean load of a rank: {plan.now.max_over_mean:.2f}, then {plan.after.max_over_mean:.2f}"
    )

    # The engine's file is where the next plan starts from.
    found = load_placement(placement)
    assert (found.expert_of_slot_LP == plan.expert_of_slot_LP).all()
    print(placement)


if __name__ == "__main__":
    main(sys.argv[1:])
