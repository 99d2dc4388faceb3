"""The training step of one rank of an Ascend job in compiled graphs, one where that can be: forward, backward, reduction, clipping, update."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Tuple

import mindspore as ms
from mindspore import ParameterTuple, Tensor, nn, ops

from pangu_locmoe.cluster.plan import exchanges, node_bytes, topology_groups
from pangu_locmoe.cluster.reduction import Reduce, ReduceBuffers, Update, UpdateFromBuffers, reduced_buffers
from pangu_locmoe.config import CapacityConfig, Config
from pangu_locmoe.data.loader import Batch
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.parallel.exchange import Ledger
from pangu_locmoe.parallel.hccl import HcclOperators
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.buffers import Accumulate, gradient_buffers
from pangu_locmoe.train.distributed import DistributedStepper, world_result
from pangu_locmoe.train.optimizer import AdamW
from pangu_locmoe.train.step import Objective, StepResult

# The front end nests a call for each parameter of an unrolled loop: 1000, its default, is too few for 40 layers. The stack
# must be large enough for it, too (`ulimit -s unlimited`).
RECURSION_LIMIT = 100_000


class GraphStep(nn.Cell):
    """`FusedStep` for the ranks of a job, whose MoE layers must have constant sizes (moe/static.py).

    Args:
        objective: of this rank's model.
        optimizer: of this rank's parameters.
        reduce, update: what follows the backward pass.
    """

    def __init__(self, objective: Objective, optimizer: AdamW, reduce: Reduce, update: Update) -> None:
        super().__init__(auto_prefix=False)
        self.gradient = ms.value_and_grad(objective, None, optimizer.parameters, has_aux=True)
        self.reduce, self.update = reduce, update

    def construct(self, learning_rate: Tensor, step: Tensor, *inputs: Tensor) -> Tuple[Tensor, Dict[str, Tensor], Tensor]:
        """`inputs` as for the objective. Returns this rank's losses and statistics, and the norm of the whole gradient."""
        (_, losses, stats), gradients = self.gradient(*inputs)
        reduced, norm = self.reduce(gradients, ops.ones((), ms.float32))
        self.update(reduced, learning_rate, step, norm)
        return losses, stats, norm


class GraphParts:
    """The cells of a compiled step: one, or with accumulation or fp16 those before and after the look at the norm.

    Args:
        config: the run.
        optimizer: of this rank's parameters.
        topology: who holds what.
        communicator: names the groups.
    """

    def __init__(self, config: Config, optimizer: AdamW, topology: Topology, communicator: HcclOperators) -> None:
        self.optimizer = optimizer
        self.reduce, self.update = Reduce(optimizer, topology, communicator), Update(optimizer, topology, communicator)
        self.buffers: Optional[ParameterTuple] = None
        if config.train.has_buffers:
            self.buffers = gradient_buffers(optimizer.parameters)
            self.reduced = reduced_buffers(optimizer, self.buffers)

    def step(self, objective: Objective) -> nn.Cell:
        """The step, or with buffers the part of it that fills them."""
        if self.buffers is None:
            return GraphStep(objective, self.optimizer, self.reduce, self.update)
        return Accumulate(objective, self.optimizer.parameters, self.buffers)

    def after(self) -> Tuple[nn.Cell, nn.Cell, nn.Cell]:
        """With buffers: the norm, the update, and what to do instead of it."""
        assert self.buffers is not None
        updates = [UpdateFromBuffers(self.update, self.buffers, self.reduced, apply) for apply in (True, False)]
        return ReduceBuffers(self.reduce, self.buffers, self.reduced), updates[0], updates[1]


class GraphStepper(DistributedStepper):
    """A `DistributedStepper` of compiled graphs: on Ascend, with static sizes.

    One graph makes a step. Accumulation and fp16 need a look between backward and update, as in `Stepper`: then a forward and
    backward pass, the reduction and the update are graphs of their own. The norm is the same on all ranks, so that all skip together.
    """

    def set_capacities(self, capacities: Tuple[int, ...]) -> None:
        refuse_graph(self.config)
        if not isinstance(self.communicator, HcclOperators):
            raise ConfigError("a step over several processes compiles as graphs on Ascend only")
        ms.set_recursion_limit(RECURSION_LIMIT)
        self.capacities = capacities
        self._parts = GraphParts(self.config, self.optimizer, self.topology, self.communicator)
        if self._parts.buffers is not None:
            self._norm, self._apply, self._clear = map(ms.jit, self._parts.after())
        self._compiled: Dict[CapacityConfig, Callable[..., Any]] = {}
        self._use_step()

    def set_factors(self, factors: CapacityConfig) -> None:
        super().set_factors(factors)
        self._use_step()

    def _use_step(self) -> None:
        """The graph of the factors there are; one that was compiled before is used again."""
        if self.factors not in self._compiled:
            self._compiled[self.factors] = ms.jit(self._parts.step(Objective(self.model, self.config, self.capacities)))
        self._step = self._compiled[self.factors]

    def __call__(self, batch: Batch, step: int, learning_rate: float) -> StepResult:
        inputs = list(self._micro_batches(batch, step))
        rate, number = Tensor(learning_rate, ms.float32), Tensor(step, ms.int32)
        if self._parts.buffers is None:
            losses, stats, norm = self._step(rate, number, *inputs[0], Tensor(1.0, ms.float32))
            return self._result([(losses, stats)], float(norm.asnumpy()), False)
        scale = self.loss_scale.value if self.loss_scale else 1.0
        reports = [self._step(*each, Tensor(scale, ms.float32)) for each in inputs]
        norm = self._norm(Tensor(1.0 / (scale * len(inputs)), ms.float32))
        value = float(norm.asnumpy())
        skipped = self._overflows(value)
        (self._clear if skipped else self._apply)(rate, number, norm)
        return self._result(reports, value, skipped)

    def _result(self, reports: List[Tuple[Tensor, Dict[str, Tensor]]], norm: float, skipped: bool) -> StepResult:
        moe = self.config.moe.model_copy(update={"capacity": self.factors})
        traffic = planned_traffic(self.config.model_copy(update={"moe": moe}), self.topology)
        return world_result(reports, norm, skipped, traffic, self.topology, self.communicator, self.config.parallel.sequence_parallel)


def refuse_graph(config: Config) -> None:
    """Raises ConfigError for what cannot be in a graph."""
    if config.trace.timeline is not None:
        raise ConfigError(f"trace.timeline = {config.trace.timeline}: nothing can be timed inside of one graph: must be null; MindSpore's profiler shows its operators")


def planned_traffic(config: Config, topology: Topology) -> Ledger:
    """What all ranks send in the exchanges of one step. Constant sizes: known without looking. Seconds are not."""
    ledger, passes = Ledger(), config.train.accumulation_steps
    for rank in range(topology.num_ranks):
        groups = topology_groups(topology, rank)
        for operation in exchanges(config, topology, rank):
            group = groups[operation.group]
            inside, between = node_bytes(operation, group, topology, rank)
            ledger.intra_node_bytes += passes * inside
            ledger.inter_node_bytes += passes * between
            crossing = sum(topology.node_of_rank(other) != topology.node_of_rank(rank) for other in group)
            ledger.inter_node_messages += passes * crossing
            ledger.intra_node_messages += passes * (len(group) - 1 - crossing)
    return ledger
