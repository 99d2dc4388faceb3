"""One optimizer step, what all ways to make one have in common: backward, reduction, clip, update.

Letters: T tokens that share the experts of a layer in one micro-batch, L MoE layers, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_locmoe.config import CapacityConfig, Config
from pangu_locmoe.config.routers import top_k
from pangu_locmoe.data.loader import Batch
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import initial_capacity
from pangu_locmoe.moe.slot_factors import starting_factors
from pangu_locmoe.parallel.exchange import Ledger
from pangu_locmoe.parallel.gradients import pieces
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.optimizer import AdamW
from pangu_locmoe.train.step import moving
from pangu_locmoe.train.step.compiled import CompiledCell
from pangu_locmoe.train.step.objective import Objective, micro_batches
from pangu_locmoe.train.step.result import Report, StepResult, step_result

KEPT_STEPS = 6  # compiled ones, each for its capacities and slot factors


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16: halve on overflow, double after `window` good steps."""

    value: float
    window: int
    good_steps: int = field(default=0)

    def update(self, overflow: bool) -> None:
        if overflow:
            self.value, self.good_steps = max(1.0, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps == self.window:
            self.value, self.good_steps = self.value * 2, 0


class Stepper(ABC):
    """Runs optimizer steps; owns the optimizer's state and the loss scale.

    A step is a backward pass for each micro-batch, the reduction of what they add up to, a look at
    its norm, and the update. Subclasses say how each is computed. The norm is the same on all
    ranks, so that all skip together.

    Between steps the `set_` methods and `move_experts` change what the next one is; all ranks of a
    job must call them alike.

    Args:
        model: what to train, in place.
        config: the run.
        world: this process's place in the job; None: a single process.
        capacities: slots for each expert in each MoE layer, over the whole expert-parallel group;
            None: the configuration's for the start of a run.

    Attributes:
        num_tokens: T.
        capacities: now.
        factors: local and remote slots now, with numbers for `auto`.
        loss_scale: None without fp16.
    """

    def __init__(
        self,
        model: PanguSigma,
        config: Config,
        world: Optional[World] = None,
        capacities: Optional[Tuple[int, ...]] = None,
    ) -> None:
        self.model = model
        self.config = config
        self.world = world or World.of(config)
        train = config.train
        topology = self.world.topology
        self.parameters = list(model.trainable_params())
        own = None
        if config.parallel.shard_optimizer:
            own = pieces(self.parameters, topology, self.world.communicator.rank)
        self.optimizer = AdamW.of(self.parameters, train, own)
        self.loss_scale: Optional[LossScale] = None
        if train.precision == "fp16":
            self.loss_scale = LossScale(train.loss_scale, train.loss_scale_window)
        tokens = config.micro_batch * config.model.seq_length
        self.num_tokens = tokens * topology.expert_parallel // topology.num_replicas
        if capacities is None:
            start = initial_capacity(
                config.moe.capacity, self.num_tokens, config.moe.num_experts, top_k(config)
            )
            capacities = (start,) * config.model.num_moe_layers
        self.capacities = capacities
        self.factors = starting_factors(config.moe.capacity)
        self.updates = 0  # made so far; steps that fp16 skipped are none
        self._steps: Dict[Any, Callable[..., Any]] = {}  # the latest used last

    def set_capacities(self, capacities: Tuple[int, ...]) -> None:
        """Use other capacities from the next step on."""
        self.capacities = capacities
        self._use_step()

    def set_factors(self, factors: CapacityConfig) -> None:
        """Train with other local and remote factors from the next step on (static sizes)."""
        self.factors = factors
        for layer in self.model.moe_layers.values():
            layer.transport.set_factors(factors)
        self._use_step()

    @property
    def expert_of_slot_LP(self) -> Optional[np.ndarray]:
        """Where experts are, int [L, P]; None in a single process, and without MoE layers."""
        if self.world.exchange is None or not self.model.moe_layers:
            return None
        return moving.expert_of_slot(self.model)

    def move_experts(self, next_expert_of_slot_LP: np.ndarray) -> None:
        """Bring experts and their moments to other ranks: an expert for each slot, int [L, P]."""
        assert self.world.exchange is not None
        moving.move_experts(self.model, self.optimizer, self.world.exchange, next_expert_of_slot_LP)

    def __call__(self, batch: Batch, step: int, learning_rate: float) -> StepResult:
        """Train on one global batch.

        `step` counts from 1, and is what randomness depends on; Adam counts `updates`.
        """
        inputs = micro_batches(batch, step, self.config, self.world)
        rate = Tensor(learning_rate, ms.float32)
        number = Tensor(self.updates + 1, ms.int32)
        reports, norm, skipped = self._advance(inputs, rate, number)
        self.updates += not skipped
        rows_divided = self.config.parallel.sequence_parallel
        return step_result(reports, norm, skipped, self._traffic(skipped), self.world, rows_divided)

    def _advance(
        self, inputs: Sequence[Tuple[Tensor, ...]], rate: Tensor, number: Tensor
    ) -> Tuple[List[Report], float, bool]:
        """The step itself.

        Returns:
            a report for each micro-batch, the norm, and whether fp16 overflowed: then no update.
        """
        scale = self.loss_scale.value if self.loss_scale else 1.0
        factor = 1.0 / (scale * len(inputs))
        reports = [self._backward(*each, Tensor(scale, ms.float32)) for each in inputs]
        norm = self._reduce(factor)
        value = float(norm.asnumpy())
        skipped = self._overflows(value)
        self._update(rate, number, norm, skipped)
        return reports, value, skipped

    def _overflows(self, norm: float) -> bool:
        """Whether fp16 overflowed; the loss scale follows.

        Without loss scaling a norm that is not finite is a divergence, which the loop reports.
        """
        if self.loss_scale is None:
            return False
        overflow = not np.isfinite(norm)
        self.loss_scale.update(overflow)
        return overflow

    def _use_step(self) -> None:
        """The step of these capacities and factors; one used of late is not compiled anew."""
        key = (self.capacities, self.factors)
        self._step = self._steps.pop(key) if key in self._steps else self._make_step()
        self._steps[key] = self._step
        if len(self._steps) > KEPT_STEPS:
            self._release(self._steps.pop(next(iter(self._steps))))

    def _release(self, step: Callable[..., Any]) -> None:
        """A step that will not be used again."""
        if isinstance(step, CompiledCell):
            step.release()

    def _objective(self) -> Objective:
        return Objective(self.model, self.config, self.capacities)

    @abstractmethod
    def _make_step(self) -> Callable[..., Any]:
        """What `_step` is with the capacities and factors there are."""

    @abstractmethod
    def _backward(self, *inputs: Tensor) -> Report:
        """Add a micro-batch's gradients to those of the step; `inputs` as for the objective."""

    @abstractmethod
    def _reduce(self, factor: float) -> Tensor:
        """Reduce the step's gradients over ranks, times `factor`; returns their norm."""

    @abstractmethod
    def _update(self, rate: Tensor, number: Tensor, norm: Tensor, skipped: bool) -> None:
        """Update from the step's gradients unless it is skipped, and forget them."""

    def _traffic(self, skipped: bool) -> Optional[Ledger]:
        """What all ranks exchanged in the step, which fp16 skipped or not; None in a single
        process.
        """
        return None
