"""The step of a single process: one graph where that can be.

In fp32 or bf16 without accumulation the whole step is one compiled graph. Accumulation and fp16's
loss scaling need a look between backward and update, so there a step is a compiled backward pass
for each micro-batch and two compiled parts after it.
"""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Sequence, Tuple

import mindspore as ms
from mindspore import Tensor, nn

from pangu_locmoe.config import Config
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.step.cells import ReduceAlone, StepParts
from pangu_locmoe.train.step.compiled import CompiledCell
from pangu_locmoe.train.step.result import Report
from pangu_locmoe.train.step.stepper import Stepper


class LocalStepper(Stepper):
    """A stepper of compiled graphs, with all experts and all tokens in this process."""

    def __init__(
        self,
        model: PanguSigma,
        config: Config,
        world: Optional[World] = None,
        capacities: Optional[Tuple[int, ...]] = None,
    ) -> None:
        super().__init__(model, config, world, capacities)
        self._parts = self._make_parts()
        if self._parts.buffers is not None:
            self._norm, self._apply, self._clear = map(self._compile, self._parts.after())
        self._use_step()

    def _make_parts(self) -> StepParts:
        return StepParts(self.config.train, self.optimizer, ReduceAlone(self.optimizer))

    def _compile(self, cell: nn.Cell) -> Callable[..., Any]:
        return CompiledCell(cell) if self.config.train.mode == "graph" else cell

    def _make_step(self) -> Callable[..., Any]:
        return self._compile(self._parts.step(self._objective()))

    def _advance(
        self, inputs: Sequence[Tuple[Tensor, ...]], rate: Tensor, number: Tensor
    ) -> Tuple[List[Report], float, bool]:
        if self._parts.buffers is not None:
            return super()._advance(inputs, rate, number)
        losses, values, norm = self._step(rate, number, *inputs[0], Tensor(1.0, ms.float32))
        return [self._report(losses, values)], float(norm.asnumpy()), False

    def _backward(self, *inputs: Tensor) -> Report:
        return self._report(*self._step(*inputs))

    def _report(self, losses: Tensor, values: Tuple[Tensor, ...]) -> Report:
        return losses, dict(zip(self.model.stats_names, values))

    def _reduce(self, factor: float) -> Tensor:
        return self._norm(Tensor(factor, ms.float32))

    def _update(self, rate: Tensor, number: Tensor, norm: Tensor, skipped: bool) -> None:
        (self._clear if skipped else self._apply)(rate, number, norm)
