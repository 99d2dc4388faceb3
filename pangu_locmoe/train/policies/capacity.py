"""How capacities change while a run trains: from token choice to expert choice, and with LocMoE's
and LocMoE+'s bounds.

A change follows from the step, its result and the capacities there are, which checkpoints keep: an
interrupted run goes on as it would have.

Letters: T tokens that share the experts of a layer in one micro-batch, L MoE layers, N source
nodes, E experts, I micro-batches, Z expert-parallel groups, X parts of a step: I * Z.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Mapping

import numpy as np

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import top_k
from pangu_locmoe.moe.capacity import (
    CapacityBounds,
    bound_capacity,
    capacity_bounds,
    cosine_statistic,
    drop_floor,
    dynamic_capacity,
    initial_capacity,
    transition_capacity,
)
from pangu_locmoe.train.metrics import Row
from pangu_locmoe.train.step import Stepper, StepResult

EVERY = 100
HYSTERESIS = 0.2


class Capacity:
    """Each layer's capacity, step by step.

    Args:
        config: the run.
        stepper: whose capacities change.
    """

    def __init__(self, config: Config, stepper: Stepper) -> None:
        self._config = config
        self._capacity = config.moe.capacity
        self._stepper = stepper
        self._upper = initial_capacity(
            config.moe.capacity, stepper.num_tokens, config.moe.num_experts, top_k(config)
        )
        choice = config.moe.token_choice
        self._transition = choice.transition_steps if choice is not None else 0
        self._every = EVERY if self._capacity.every is None else self._capacity.every
        self._hysteresis = (
            HYSTERESIS if self._capacity.hysteresis is None else self._capacity.hysteresis
        )
        if self._scheduled(0) != self._upper:
            stepper.set_capacities((self._scheduled(0),) * config.model.num_moe_layers)

    def __call__(self, step: int, result: StepResult) -> Iterator[Row]:
        if self._measures(step) and len(result.cosine_LT):
            yield self._measure(step, result)
        elif step <= self._transition and self._scheduled(step) != self._scheduled(step - 1):
            capacity = self._scheduled(step)
            self._stepper.set_capacities((capacity,) * len(self._stepper.capacities))
            yield {"step": step, "event": "token_choice", "capacity": capacity}

    def state(self) -> Dict[str, Any]:
        return {"capacities": list(self._stepper.capacities)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._stepper.set_capacities(tuple(state["capacities"]))

    def _scheduled(self, step: int) -> int:
        return transition_capacity(step, self._transition, self._stepper.num_tokens, self._upper)

    def _measures(self, step: int) -> bool:
        if self._capacity.policy == "bound":
            return step == self._capacity.warmup_steps
        if self._capacity.policy != "dynamic" or step % self._every:
            return False
        return step >= max(self._capacity.warmup_steps, self._transition)

    def _measure(self, step: int, result: StepResult) -> Row:
        model = self._config.model
        capacities = []
        first = model.num_layers - 1 - model.num_moe_layers
        layers: List[Dict[str, Any]] = []
        loads_LXE = self._loads(result)
        for index, cosines_T in enumerate(result.cosine_LT):
            delta = cosine_statistic(np.clip(cosines_T, -1, 1), self._capacity.statistic)
            bounds = capacity_bounds(model.hidden_size, self._config.moe.num_experts, delta)
            parts_XE = loads_LXE[index]
            tokens = len(parts_XE) * self._stepper.num_tokens
            floor = drop_floor(parts_XE, tokens, self._capacity.allowed_drop)
            capacities.append(self._next(bounds, self._stepper.capacities[index], floor))
            wanted = bounds.exact if self._capacity.policy == "bound" else bounds.exponential
            layers.append(
                {
                    "layer": first + index,
                    "delta": delta,
                    "exact": bounds.exact,
                    "erfc": bounds.erfc,
                    "exponential": bounds.exponential,
                    "floor": floor,
                    "set_by": "factor"
                    if max(wanted, floor) >= self._upper
                    else "max_drop"
                    if floor > max(wanted, 1.0)
                    else "bound",
                    "capacity": capacities[-1],
                }
            )
        self._stepper.set_capacities(tuple(capacities))
        return {"step": step, "event": "capacity", "layers": layers}

    def _next(self, bounds: CapacityBounds, now: int, floor: int) -> int:
        if self._capacity.policy == "bound":
            return bound_capacity(bounds, self._upper, floor)
        return dynamic_capacity(bounds, self._upper, now, self._hysteresis, floor)

    def _loads(self, result: StepResult) -> np.ndarray:
        """Assignments to each expert in each part of the step, [L, X, E]: only the tokens of a part
        share slots.

        Groups are runs of nodes; those inside of one node, whose counts come as one, are taken to
        be alike.
        """
        loads_ILNE = result.load_LNE[None] if result.loads_ILNE is None else result.loads_ILNE
        micro_batches, layers, nodes, experts = loads_ILNE.shape
        groups = max(
            1, self._config.micro_batch * self._config.model.seq_length // self._stepper.num_tokens
        )
        runs = groups if nodes % groups == 0 else 1
        loads_ILZE = loads_ILNE.reshape(micro_batches, layers, runs, nodes // runs, experts).sum(
            axis=3
        )
        loads_ILZE = np.repeat(loads_ILZE / (groups // runs), groups // runs, axis=2)
        return loads_ILZE.transpose(1, 0, 2, 3).reshape(layers, -1, experts)
