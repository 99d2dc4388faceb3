"""What a job changes between its steps, and remembers: how many slots tokens have, and where experts are."""

from __future__ import annotations

import time
from typing import Any, Dict, Iterator, Optional

import numpy as np

from pangu_locmoe.config import Config
from pangu_locmoe.moe import slot_factors
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train import placement
from pangu_locmoe.train.callbacks import Row, WriteTrace
from pangu_locmoe.train.distributed import DistributedStepper
from pangu_locmoe.train.step import StepResult


class BetweenSteps:
    """Slot factors that are `auto` follow the counts, and experts follow their tokens. All ranks do the same.

    Args:
        config: the run.
        world: this rank's place in the job.
        stepper: whose model and optimizer are changed.
    """

    def __init__(self, config: Config, world: World, stepper: DistributedStepper) -> None:
        self._config, self._world, self._stepper = config, world, stepper
        self._plans = config.placement.policy != "off"
        self._moves = self._plans or config.placement.start is not None
        self._follows = slot_factors.automatic(config.moe.capacity)
        if config.placement.start is not None:
            placement.move_experts(stepper.model, stepper.optimizer, stepper.exchange, placement.starting_slots(config))

    @property
    def slot_to_expert(self) -> Optional[np.ndarray]:
        """Where experts are, int [L, E]; None where they are in order and stay."""
        return placement.slot_to_expert(self._stepper.model) if self._moves else None

    def __call__(self, step: int, result: StepResult, trace: Optional[WriteTrace]) -> Iterator[Row]:
        """After each step; `trace` is rank 0's. Yields a row for everything that changed."""
        if self._follows and step % slot_factors.EVERY == 0:
            yield from self._follow_counts(step, result)
        if self._plans and step % self._config.placement.every == 0 and step < self._config.train.steps:
            yield from self._place_experts(step, trace)

    def _follow_counts(self, step: int, result: StepResult) -> Iterator[Row]:
        before = self._stepper.factors
        tokens = self._config.train.batch_size * self._config.model.seq_length
        after = slot_factors.next_factors(self._config.moe.capacity, before, result.load_LNE, self._world.topology, tokens)
        if after != before:
            self._stepper.set_factors(after)
            yield {"step": step, "event": "slots", "local_factor": after.local_factor, "remote_factor": after.remote_factor}

    def _place_experts(self, step: int, trace: Optional[WriteTrace]) -> Iterator[Row]:
        """Plan from the trace, and move what the plan moves."""
        started = time.perf_counter()
        model, now_LE = self._stepper.model, placement.slot_to_expert(self._stepper.model)
        plan = None
        if trace is not None:
            plan = placement.plan_placement(self._config, self._world.topology, trace.trace, step, now_LE)
        wanted_LE = placement.agree(plan, now_LE, self._world.communicator)
        placement.move_experts(model, self._stepper.optimizer, self._stepper.exchange, wanted_LE)
        if plan is not None:
            yield placement.event(step, plan, started)

    def state(self) -> Dict[str, Any]:
        """For the checkpoint."""
        state: Dict[str, Any] = {}
        if self._follows:
            state["slot_factors"] = [self._stepper.factors.local_factor, self._stepper.factors.remote_factor]
        if self._moves:
            state["slot_to_expert"] = placement.slot_to_expert(self._stepper.model).tolist()
        return state

    def restore(self, state: Dict[str, Any]) -> None:
        """From a checkpoint, before its weights are loaded: experts have to be where they are read. It may be of a run without either."""
        if self._follows and "slot_factors" in state:
            local, remote = state["slot_factors"]
            self._stepper.set_factors(self._stepper.factors.model_copy(update={"local_factor": local, "remote_factor": remote}))
        if self._moves and "slot_to_expert" in state:
            for layer, slots in zip(self._stepper.model.moe_layers.values(), state["slot_to_expert"]):
                layer.place(np.asarray(slots))
