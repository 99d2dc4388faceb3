"""What changes between the steps of a run, each by a policy of one shape."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, List, Mapping, Protocol

from pangu_locmoe.config import Config
from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.train.metrics import Row
from pangu_locmoe.train.policies.balance import Balance
from pangu_locmoe.train.policies.capacity import Capacity
from pangu_locmoe.train.policies.placement import Placement
from pangu_locmoe.train.policies.slot_factors import SlotFactors
from pangu_locmoe.train.step import Stepper, StepResult


class Policy(Protocol):
    """Looks at each step and may change the stepper for the next one.

    All ranks of a job call it alike, with results that are the same on all of them, and so make the
    same changes. Whatever it goes by is in the result or in its state: an interrupted run goes on
    as it would have.
    """

    def __call__(self, step: int, result: StepResult) -> Iterator[Row]:
        """After a step: change what is to change; yield a row for metrics.jsonl for each change.

        It acts as it is iterated, so it has to be used up.
        """

    def state(self) -> Dict[str, Any]:
        """For the checkpoint's state.json; the keys of all policies are different."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint's state, before its weights are loaded.

        The checkpoint may be of a run without this policy.
        """


def make_policies(config: Config, stepper: Stepper, trace: Callable[[], Trace]) -> List[Policy]:
    """The policies that a configuration asks for, in the order in which they act.

    Args:
        config: the run.
        stepper: what they change; at once where the run does not start as the stepper does.
        trace: the load trace up to the step that was made; asked for on rank 0, which records it.
    """
    policies: List[Policy] = [Capacity(config, stepper)]
    if Balance.wanted(config):
        policies.append(Balance(config, stepper))
    if SlotFactors.wanted(config, stepper):
        policies.append(SlotFactors(config, stepper))
    if Placement.wanted(config, stepper):
        policies.append(Placement(config, stepper, trace))
    return policies
