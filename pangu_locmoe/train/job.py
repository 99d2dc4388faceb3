"""`python -m pangu_locmoe.train.job CONFIG [flags]`: what scripts/job.sh asks before it starts
processes.

Prints how many ranks and nodes the job has and how many ranks share the experts; stops, with one
line and exit code 2, where the configuration does not fit them. One process emulates as many nodes,
so the same file trains there with the same losses.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

from pangu_locmoe.config import Config, load_config
from pangu_locmoe.errors import LocMoEError, TopologyError
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.loggers import check_loggers
from pangu_locmoe.train.run import check_device

RANKS = 4  # unless something else is said: they fit two cores


@dataclass(frozen=True)
class Job:
    """A job of one machine: its ranks, the nodes they count as, and what is set so that they
    share the experts.
    """

    ranks: int
    nodes: int
    expert_parallel: int

    @property
    def overrides(self) -> List[str]:
        return [f"parallel.nodes={self.nodes}", f"parallel.expert_parallel={self.expert_parallel}"]


def plan_job(
    path: Path,
    overrides: List[str],
    ranks: Optional[int] = None,
    nodes: Optional[int] = None,
    ranks_per_node: Optional[int] = None,
) -> Tuple[Config, Job]:
    """The job of a configuration, and the configuration with what the job sets.

    Args:
        path: the configuration.
        overrides: `key=value`; those of parallel.nodes must agree with the numbers below.
        ranks: processes; None: ranks_per_node in each node, else 4, or where their nodes do not
            divide 4, the fewest.
        nodes: None: as ranks and ranks_per_node make, else parallel.nodes.
        ranks_per_node: None: as the others make.

    Raises:
        LocMoEError: the configuration is wrong, or the job does not fit it.
    """
    found: List[Job] = []

    def completed(config: Config) -> List[str]:
        found.append(
            _job(
                config,
                {override.partition("=")[0] for override in overrides},
                ranks,
                nodes,
                ranks_per_node,
            )
        )
        return found[0].overrides

    config = load_config(path, overrides, completed)
    Topology.from_config(config, found[0].ranks)
    return config, found[0]


def _job(
    config: Config,
    explicit: set[str],
    ranks: Optional[int],
    nodes: Optional[int],
    ranks_per_node: Optional[int],
) -> Job:
    parallel = config.parallel
    if ranks is not None and ranks_per_node is not None:
        if ranks % ranks_per_node:
            raise TopologyError(
                f"--ranks {ranks}: must be divisible by --ranks-per-node {ranks_per_node}"
            )
        if nodes not in (None, ranks // ranks_per_node):
            raise TopologyError(
                f"--nodes {nodes}: --ranks {ranks} with --ranks-per-node {ranks_per_node} "
                f"are {ranks // ranks_per_node} nodes; leave one of them out"
            )
        nodes = ranks // ranks_per_node
    if nodes is not None and "parallel.nodes" in explicit and nodes != parallel.nodes:
        raise TopologyError(
            f"parallel.nodes = {parallel.nodes}: the script's flags make {nodes} nodes; "
            "leave --set parallel.nodes or the flags out"
        )
    nodes = nodes or parallel.nodes
    if ranks is None:
        least = nodes * parallel.tensor_parallel
        ranks = nodes * ranks_per_node if ranks_per_node else RANKS if RANKS % least == 0 else least
    sharing = parallel.expert_parallel
    if (
        sharing == 1
        and "parallel.expert_parallel" not in explicit
        and ranks % parallel.tensor_parallel == 0
    ):
        sharing = ranks // parallel.tensor_parallel
        if config.moe.num_experts % sharing:
            raise TopologyError(
                f"moe.num_experts ({config.moe.num_experts}) must be divisible by the "
                f"{sharing} ranks that would share the experts; "
                "give --ranks that divide it, or --set parallel.expert_parallel to a "
                "divisor of both"
            )
    return Job(ranks, nodes, sharing)


def main(arguments: List[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pangu_locmoe.train.job", allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    for flag in ("--ranks", "--nodes", "--ranks-per-node"):
        parser.add_argument(flag, type=int)
    options = parser.parse_args(arguments)
    try:
        config, job = plan_job(
            options.config, options.set, options.ranks, options.nodes, options.ranks_per_node
        )
        check_device(config)
        check_loggers(config)
    except LocMoEError as error:
        print(error, file=sys.stderr)
        return 2
    print(job.ranks, job.nodes, job.expert_parallel)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
