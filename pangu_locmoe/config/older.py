"""Keys of older versions: what to write now, and what they mean in the files of runs and
checkpoints, which still load.
"""

from __future__ import annotations

from typing import Any, Dict, Optional


def replacement(key: str, value: Any) -> Optional[str]:
    """What to write for a key of an older version; None for a key that never was one."""
    if key not in ("parallel.emulated_nodes", "parallel.ranks_per_node"):
        return None
    if value is None or (key == "parallel.emulated_nodes" and value == 1):
        return "parallel.nodes takes its place; leave it out"
    if key == "parallel.emulated_nodes":
        return f"parallel.nodes takes its place; write parallel.nodes: {value}"
    return (
        "parallel.nodes takes its place; write parallel.nodes: N, the number of ranks divided "
        f"by {value}"
    )


def renewed(values: Dict[str, Any]) -> Dict[str, Any]:
    """The values of a file that an older version wrote, with the keys of this one.

    How many ranks a job had was not kept with ranks_per_node: parallel.nodes becomes the nodes over
    which a layer's experts are spread, and 2 where the run needed several. Neither evaluation nor
    resumption goes by it.
    """
    parallel = values.get("parallel")
    if not isinstance(parallel, dict) or not {"emulated_nodes", "ranks_per_node"} & set(parallel):
        return values
    kept = {
        key: value
        for key, value in parallel.items()
        if key not in ("emulated_nodes", "ranks_per_node")
    }
    nodes = parallel.get("emulated_nodes", 1)
    per_node = parallel.get("ranks_per_node")
    if isinstance(per_node, int) and per_node > 0:
        spread = parallel.get("expert_parallel", 1) * parallel.get("tensor_parallel", 1) // per_node
        several = (
            values.get("data", {}).get("sharding", "iid") != "iid"
            or parallel.get("exchange") == "hierarchical"
        )
        nodes = max(nodes, spread, 2 if several else 1)
    return {**values, "parallel": {"nodes": nodes, **kept}}
