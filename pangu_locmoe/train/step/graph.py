"""The step of one rank of an Ascend job in compiled graphs, one where that can be.

As a single process's, with HCCL's operators in it.
"""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
from mindspore import nn

from pangu_locmoe.config import Config
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.parallel.buckets import GatherPieces, Weight
from pangu_locmoe.parallel.exchange import Ledger
from pangu_locmoe.parallel.hccl import HcclOperators
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.optimizer import AdamW
from pangu_locmoe.train.step.cells import StepParts
from pangu_locmoe.train.step.compiled import CompiledCell
from pangu_locmoe.train.step.local import LocalStepper
from pangu_locmoe.train.step.reduction import Reduce
from pangu_locmoe.train.step.traffic import planned_traffic

# The front end nests a call for each parameter of an unrolled loop: 1000, its default, is too few
# for 40 layers. The stack must be large enough for it, too (`ulimit -s unlimited`).
RECURSION_LIMIT = 100_000


class GraphStepper(LocalStepper):
    """A `LocalStepper` for the ranks of a job, whose exchanges have constant sizes (static).

    Raises:
        ConfigError: what is asked for cannot be in a graph, or these are not Ascend's processes.
    """

    def _make_parts(self) -> StepParts:
        refuse_graph(self.config)
        communicator = self.world.communicator
        if not isinstance(communicator, HcclOperators):
            raise ConfigError("a step over several processes compiles as graphs on Ascend only")
        ms.set_recursion_limit(RECURSION_LIMIT)
        return graph_parts(self.config, self.optimizer, self.world.topology, communicator)

    def _compile(self, cell: nn.Cell) -> Callable[..., Any]:
        return CompiledCell(cell)

    def _traffic(self, skipped: bool) -> Ledger:
        moe = self.config.moe.model_copy(update={"capacity": self.factors})
        config = self.config.model_copy(update={"moe": moe})
        weights = [Weight.of(parameter) for parameter in self.parameters]
        return planned_traffic(config, self.world.topology, weights, skipped)


def graph_parts(
    config: Config, optimizer: AdamW, topology: Topology, communicator: HcclOperators
) -> StepParts:
    """The cells of a rank's step; `communicator` makes their groups, in the same order on all."""
    reduce = Reduce(optimizer, topology, communicator)
    if not any(optimizer.divided):
        return StepParts(config.train, optimizer, reduce)
    gather = GatherPieces(
        list(optimizer.parameters), optimizer.pieces, topology, communicator, in_graph=True
    )
    return StepParts(config.train, optimizer, reduce, gather)


def refuse_graph(config: Config) -> None:
    """Raises ConfigError for what cannot be in a graph."""
    if config.trace.timeline is not None:
        raise ConfigError(
            f"trace.timeline = {config.trace.timeline}: nothing can be timed inside of one graph: "
            "must be null; MindSpore's profiler shows its operators"
        )
