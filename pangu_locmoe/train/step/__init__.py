"""One optimizer step, in a single process or as a rank of a job.

One family of steppers (stepper.py: local, counts, graph) over one objective and one result.
"""

from __future__ import annotations

from pangu_locmoe.config import Config
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.hccl import HcclOperators
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.step.counts import CountsStepper
from pangu_locmoe.train.step.graph import GraphStepper
from pangu_locmoe.train.step.local import LocalStepper
from pangu_locmoe.train.step.objective import LOSSES, Objective
from pangu_locmoe.train.step.result import StepResult
from pangu_locmoe.train.step.stepper import KEPT_STEPS, LossScale, Stepper

__all__ = [
    "KEPT_STEPS",
    "LOSSES",
    "CountsStepper",
    "GraphStepper",
    "LocalStepper",
    "LossScale",
    "Objective",
    "StepResult",
    "Stepper",
    "make_stepper",
]


def make_stepper(model: PanguSigma, config: Config, world: World) -> Stepper:
    """The stepper that a run needs, with the configuration's capacities.

    Raises:
        ConfigError: trace.timeline is asked for where no rank could be watched.
    """
    if world.exchange is None:
        if config.trace.timeline is not None:
            raise ConfigError(
                f"trace.timeline = {config.trace.timeline}: shows what the ranks of a job do, "
                "and there is 1 process; must be null"
            )
        return LocalStepper(model, config, world)
    static = config.parallel.sizes == "static" and isinstance(world.communicator, HcclOperators)
    if static and config.train.mode == "graph":
        return GraphStepper(model, config, world)
    return CountsStepper(model, config, world)
