"""How capacities change while a run trains: from token choice to expert choice, and with LocMoE's and LocMoE+'s bounds.

A change follows from the step, its result and the capacities there are, which checkpoints keep: an interrupted run goes on as it
would have.

Letters: T tokens that share the experts of a layer in one micro-batch, L MoE layers.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from pangu_locmoe.config import Config
from pangu_locmoe.moe.capacity import (
    CapacityBounds,
    bound_capacity,
    capacity_bounds,
    cosine_statistic,
    dynamic_capacity,
    initial_capacity,
    transition_capacity,
)
from pangu_locmoe.train.step import StepResult

EVERY, HYSTERESIS = 100, 0.2

Capacities = Tuple[int, ...]


class CapacityPolicy:
    """Each layer's capacity, step by step.

    Args:
        config: the run.
        num_tokens: T.
    """

    def __init__(self, config: Config, num_tokens: int) -> None:
        self._config, self._capacity, self._num_tokens = config, config.moe.capacity, num_tokens
        self._upper = initial_capacity(config.moe.capacity, num_tokens, config.moe.num_experts)
        self._transition = config.moe.token_choice.transition_steps if config.moe.token_choice is not None else 0
        self._every = EVERY if self._capacity.every is None else self._capacity.every
        self._hysteresis = HYSTERESIS if self._capacity.hysteresis is None else self._capacity.hysteresis

    def initial(self) -> Capacities:
        """At the start of a run."""
        return (self._scheduled(0),) * self._config.model.num_moe_layers

    def __call__(self, step: int, result: StepResult, now: Capacities) -> Optional[Tuple[Capacities, Dict[str, Any]]]:
        """The capacities from now on and an event row where the run has something to report; None after every other step."""
        if self._measures(step) and len(result.cosine_LT):
            return self._measure(step, result, now)
        if step <= self._transition and self._scheduled(step) != self._scheduled(step - 1):
            capacity = self._scheduled(step)
            return (capacity,) * len(now), {"step": step, "event": "token_choice", "capacity": capacity}
        return None

    def _scheduled(self, step: int) -> int:
        return transition_capacity(step, self._transition, self._num_tokens, self._upper)

    def _measures(self, step: int) -> bool:
        if self._capacity.policy == "bound":
            return step == self._capacity.warmup_steps
        return self._capacity.policy == "dynamic" and step >= max(self._capacity.warmup_steps, self._transition) and step % self._every == 0

    def _measure(self, step: int, result: StepResult, now: Capacities) -> Tuple[Capacities, Dict[str, Any]]:
        model, capacities = self._config.model, []
        layers: List[Dict[str, Any]] = []
        for index, cosines_T in enumerate(result.cosine_LT):
            delta = cosine_statistic(np.clip(cosines_T, -1, 1), self._capacity.statistic)
            bounds = capacity_bounds(model.hidden_size, self._config.moe.num_experts, delta)
            capacities.append(self._next(bounds, now[index]))
            layers.append(
                {
                    "layer": model.num_layers - 1 - model.num_moe_layers + index,
                    "delta": delta,
                    "exact": bounds.exact,
                    "erfc": bounds.erfc,
                    "exponential": bounds.exponential,
                    "capacity": capacities[-1],
                }
            )
        return tuple(capacities), {"step": step, "event": "capacity", "layers": layers}

    def _next(self, bounds: CapacityBounds, now: int) -> int:
        if self._capacity.policy == "bound":
            return bound_capacity(bounds, self._upper)
        return dynamic_capacity(bounds, self._upper, now, self._hysteresis)
