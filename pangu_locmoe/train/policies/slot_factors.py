"""moe.capacity.local_factor and remote_factor `auto`, while a run trains.

moe/slot_factors.py has the rule.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, Mapping

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import top_k
from pangu_locmoe.moe.slot_factors import EVERY, automatic, next_factors
from pangu_locmoe.train.metrics import Row
from pangu_locmoe.train.step import Stepper, StepResult


class SlotFactors:
    """Slots follow the counts of every 20th step.

    Args:
        config: the run, with a factor that is `auto`.
        stepper: whose factors change; a rank's of a job.
    """

    def __init__(self, config: Config, stepper: Stepper) -> None:
        self._capacity = config.moe.capacity
        self._stepper = stepper
        self._assignments = config.train.batch_size * config.model.seq_length * top_k(config)

    @staticmethod
    def wanted(config: Config, stepper: Stepper) -> bool:
        """Whether the run has factors that change."""
        return automatic(config.moe.capacity) and stepper.world.exchange is not None

    def __call__(self, step: int, result: StepResult) -> Iterator[Row]:
        if step % EVERY:
            return
        now = self._stepper.factors
        topology = self._stepper.world.topology
        after = next_factors(self._capacity, now, result.load_LNE, topology, self._assignments)
        if after == now:
            return
        self._stepper.set_factors(after)
        yield {
            "step": step,
            "event": "slots",
            "local_factor": after.local_factor,
            "remote_factor": after.remote_factor,
        }

    def state(self) -> Dict[str, Any]:
        now = self._stepper.factors
        return {"slot_factors": [now.local_factor, now.remote_factor]}

    def restore(self, state: Mapping[str, Any]) -> None:
        if "slot_factors" not in state:
            return
        local, remote = state["slot_factors"]
        update = {"local_factor": local, "remote_factor": remote}
        self._stepper.set_factors(self._stepper.factors.model_copy(update=update))
