"""The training step of one rank of an Ascend job as one graph: forward, backward, reduction, clipping, update."""

from __future__ import annotations

from typing import Any, Callable, Dict, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.cluster.plan import exchanges, node_bytes, topology_groups
from pangu_locmoe.config import CapacityConfig, Config
from pangu_locmoe.data.loader import Batch
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.noise import draw_keys
from pangu_locmoe.parallel.exchange import Ledger
from pangu_locmoe.parallel.gradients import holders, kind, share
from pangu_locmoe.parallel.hccl import HcclOperators, SumOver
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.distributed import DistributedStepper, world_result
from pangu_locmoe.train.optimizer import AdamW
from pangu_locmoe.train.step import Objective, StepResult, batch_inputs

# The front end nests a call for each parameter of an unrolled loop: 1000, its default, is too few for 40 layers. The stack
# must be large enough for it, too (`ulimit -s unlimited`).
RECURSION_LIMIT = 100_000


class GraphStep(nn.Cell):
    """`FusedStep` for the ranks of a job, whose MoE layers must have constant sizes (moe/static.py).

    Args:
        objective: of this rank's model.
        optimizer: of this rank's parameters.
        topology: who holds what.
        communicator: names the groups. They are made here, in the same order on all ranks.
    """

    def __init__(self, objective: Objective, optimizer: AdamW, topology: Topology, communicator: HcclOperators) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.gradient = ms.value_and_grad(objective, None, optimizer.parameters, has_aux=True)
        rank = communicator.rank
        self.kinds = [kind(parameter) for parameter in optimizer.parameters]
        self.count = len(self.kinds)
        self.shares = [share(parameter, topology) for parameter in optimizer.parameters]
        sums = {ranks: _sum_over(ranks, communicator) for ranks in [holders(parameter, topology, rank) for parameter in optimizer.parameters]}
        self.reduce = [sums[holders(parameter, topology, rank)] for parameter in optimizer.parameters]
        self.over_experts = _sum_over(topology.expert_group(rank), communicator)
        self.over_tensor = _sum_over(topology.tensor_group(rank), communicator)

    def construct(self, learning_rate: Tensor, step: Tensor, scale: Tensor, *inputs: Tensor) -> Tuple[Tensor, Dict[str, Tensor], Tensor]:
        """`inputs` as for the objective. Returns this rank's losses and statistics, and the norm of the whole gradient."""
        (_, losses, stats), gradients = self.gradient(*inputs, scale)
        reduced = []
        whole = []
        slices = []
        experts = []
        for index in range(self.count):
            gradient = self.reduce[index](gradients[index]) * (self.shares[index] / scale)
            if self.kinds[index] == "expert":
                experts.append(gradient)
            elif self.kinds[index] == "slice":
                slices.append(gradient)
            else:
                whole.append(gradient)
            reduced.append(gradient)
        # As `gradients.squared_norm`: a rank has its own experts and slices only.
        of_experts = self.over_experts(ops.reshape(self.optimizer.squared_norm(tuple(experts)), (1,)))
        of_parts = self.over_tensor(ops.reshape(self.optimizer.squared_norm(tuple(slices)), (1,)) + of_experts)[0]
        norm = ops.sqrt(self.optimizer.squared_norm(tuple(whole)) + of_parts)
        self.optimizer.update(tuple(reduced), learning_rate, step, norm)
        return losses, stats, norm


class GraphStepper(DistributedStepper):
    """A `DistributedStepper` whose step is one compiled graph: on Ascend, with static sizes, without accumulation and fp16.

    Never run: there is no HCCL on a CPU. `pangu-locmoe check` compiles the graph.
    """

    def set_capacities(self, capacities: Tuple[int, ...]) -> None:
        refuse_graph(self.config)
        if not isinstance(self.communicator, HcclOperators):
            raise ConfigError("a step over several processes compiles as one graph on Ascend only")
        ms.set_recursion_limit(RECURSION_LIMIT)
        self.capacities = capacities
        self._compiled: Dict[CapacityConfig, Callable[..., Any]] = {}
        self._use_step()

    def set_factors(self, factors: CapacityConfig) -> None:
        super().set_factors(factors)
        self._use_step()

    def _use_step(self) -> None:
        """The graph of the factors there are; one that was compiled before is used again."""
        assert isinstance(self.communicator, HcclOperators)
        if self.factors not in self._compiled:
            objective = Objective(self.model, self.config, self.capacities)
            self._compiled[self.factors] = ms.jit(GraphStep(objective, self.optimizer, self.topology, self.communicator))
        self._step = self._compiled[self.factors]

    def __call__(self, batch: Batch, step: int, learning_rate: float) -> StepResult:
        rows_T, columns_D = draw_keys(self.config.train.seed, step, batch.tokens_BS.size, self.config.model.hidden_size)
        keys_BS = rows_T.reshape(batch.tokens_BS.shape)
        part = np.arange(len(batch.domains_B)).reshape(self.topology.num_places, -1)[self.topology.place_of_rank(self.communicator.rank)]
        inputs = batch_inputs(batch, keys_BS, Tensor(columns_D), part)
        numbers = (Tensor(learning_rate, ms.float32), Tensor(step, ms.int32), Tensor(1.0, ms.float32))
        losses, stats, norm = self._step(*numbers, *inputs)
        return world_result([(losses, stats)], float(norm.asnumpy()), False, self._traffic(), self.topology, self.communicator)

    def _traffic(self) -> Ledger:
        moe = self.config.moe.model_copy(update={"capacity": self.factors})
        return planned_traffic(self.config.model_copy(update={"moe": moe}), self.topology)


def refuse_graph(config: Config) -> None:
    """Raises ConfigError for what cannot be in one graph."""
    train = config.train
    if config.trace.timeline is not None:
        raise ConfigError(f"trace.timeline = {config.trace.timeline}: nothing can be timed inside of one graph: must be null; MindSpore's profiler shows its operators")
    if train.accumulation_steps > 1:
        raise ConfigError(f"train.accumulation_steps = {train.accumulation_steps}: a step over several processes is one graph only without accumulation: must be 1")
    if train.precision == "fp16":
        raise ConfigError("train.precision = 'fp16': needs a look at the gradients between backward and update, which one graph has not; use bf16 or fp32")


def planned_traffic(config: Config, topology: Topology) -> Ledger:
    """What all ranks send in the exchanges of one step. Constant sizes: known without looking. Seconds are not."""
    ledger = Ledger()
    for rank in range(topology.num_ranks):
        groups = topology_groups(topology, rank)
        for operation in exchanges(config, topology, rank):
            group = groups[operation.group]
            inside, between = node_bytes(operation, group, topology, rank)
            ledger.intra_node_bytes += inside
            ledger.inter_node_bytes += between
            crossing = sum(topology.node_of_rank(other) != topology.node_of_rank(rank) for other in group)
            ledger.inter_node_messages += crossing
            ledger.intra_node_messages += len(group) - 1 - crossing
    return ledger


class _Alone(nn.Cell):
    """The sum over a group of one."""

    def construct(self, x: Tensor) -> Tensor:
        return x


def _sum_over(ranks: Tuple[int, ...], communicator: HcclOperators) -> nn.Cell:
    return _Alone() if len(ranks) == 1 else SumOver(communicator.group(ranks))
