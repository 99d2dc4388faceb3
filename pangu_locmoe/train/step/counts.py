"""The step of several processes whose exchange has sizes that follow the routing.

It runs in PyNative around compiled parts of the model.

Constant sizes run in it as well where no graph can hold the exchange: on CPU.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Callable, List, Optional, Sequence, Tuple

import mindspore as ms
from mindspore import Tensor, ops

from pangu_locmoe.config import Config
from pangu_locmoe.data.loader import Batch
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.buckets import GatherPieces, SumGradients, Weight
from pangu_locmoe.parallel.exchange import Ledger, Traffic
from pangu_locmoe.parallel.gradients import KINDS, gradient_factor, kinds, squared_norm
from pangu_locmoe.parallel.timeline import Timeline, gather_spans
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.step.result import Report, StepResult, gather_ledgers
from pangu_locmoe.train.step.stepper import Stepper
from pangu_locmoe.train.step.traffic import gathers, sent, sums


class CountsStepper(Stepper):
    """A stepper whose batch and experts are shared by the ranks of a job.

    Args:
        model: this rank's, with an exchange.
        config: the run; with train.mode: graph what is between the exchanges is compiled.
        world: has the exchange, whose ledger is read after each step.
        capacities: as of `Stepper`.
    """

    def __init__(
        self,
        model: PanguSigma,
        config: Config,
        world: World,
        capacities: Optional[Tuple[int, ...]] = None,
    ) -> None:
        super().__init__(model, config, world, capacities)
        assert world.exchange is not None
        self._exchange = world.exchange
        self._communicator = world.communicator
        self._kinds = kinds(self.parameters, self.optimizer.pieces)
        self._gradients: List[Tensor] = []  # of the step that is being made
        topology = world.topology
        shared = (self.parameters, self.optimizer.pieces, topology, world.communicator, False)
        self._sum = SumGradients(*shared)
        self._gather = GatherPieces(*shared)
        self._factors = [gradient_factor(each, topology) for each in self.parameters]
        weights = [Weight.of(parameter) for parameter in self.parameters]
        rank = world.communicator.rank
        self._sum_traffic, self._gather_traffic = (
            sent(operations(config, topology, rank, weights), topology, rank)
            for operations in (sums, gathers)
        )
        if config.train.mode == "graph":
            model.compile_parts()
        self._use_step()

    def __call__(self, batch: Batch, step: int, learning_rate: float) -> StepResult:
        if step != self.config.trace.timeline:
            return super().__call__(batch, step, learning_rate)
        timeline = Timeline()
        started = time.time()
        self._exchange.timeline = timeline
        with timeline.watch([layer.experts for layer in self.model.moe_layers.values()]):
            result = super().__call__(batch, step, learning_rate)
        self._exchange.timeline = None
        timeline.add("step", started)
        return replace(result, spans=gather_spans(timeline, self._communicator))

    def _make_step(self) -> Callable[..., Any]:
        step: Callable[..., Any] = ms.value_and_grad(
            self._objective(), None, self.optimizer.parameters, has_aux=True
        )
        return step

    def _advance(
        self, inputs: Sequence[Tuple[Tensor, ...]], rate: Tensor, number: Tensor
    ) -> Tuple[List[Report], float, bool]:
        self._exchange.ledger.take()  # an evaluation since the last step is not this step's traffic
        return super()._advance(inputs, rate, number)

    def _backward(self, *inputs: Tensor) -> Report:
        (_, losses, stats), new = self._step(*inputs)
        before = self._gradients
        self._gradients = [a + b for a, b in zip(before, new)] if before else list(new)
        return losses, stats

    def _reduce(self, factor: float) -> Tensor:
        topology = self.world.topology
        optimizer = self.optimizer
        began = time.time()
        started = time.perf_counter()
        summed = self._sum(tuple(self._gradients))
        self._account(began, started, self._sum_traffic)
        reduced = [gradient * (own * factor) for gradient, own in zip(summed, self._factors)]
        self._gradients = reduced
        of_kinds = [
            tuple(gradient for gradient, one in zip(reduced, self._kinds) if one == each)
            for each in KINDS
        ]
        whole, slices, experts, shared = map(optimizer.squared_norm, of_kinds)
        own = shared if any(optimizer.divided) else None
        return ops.sqrt(squared_norm(whole, slices, experts, own, topology, self._communicator))

    def _update(self, rate: Tensor, number: Tensor, norm: Tensor, skipped: bool) -> None:
        gradients, self._gradients = self._gradients, []
        if skipped:
            return
        optimizer = self.optimizer
        optimizer.update(tuple(gradients), rate, number, norm)
        if any(optimizer.divided):
            began = time.time()
            started = time.perf_counter()
            whole = self._gather(tuple(optimizer.updated))
            for parameter, value, divided in zip(self.parameters, whole, optimizer.divided):
                if divided:
                    ops.assign(parameter, value)
            self._account(began, started, self._gather_traffic)

    def _account(self, began: float, started: float, moved: Traffic) -> None:
        """Note a reduction, or a gathering of pieces, that is over now, and what it moved.

        `began` and `started` are of time's two clocks.
        """
        ledger = self._exchange.ledger
        ledger.reduce_seconds += time.perf_counter() - started
        ledger.reduction.add(moved)
        if self._exchange.timeline is not None:
            self._exchange.timeline.add("reduction", began)

    def _traffic(self, skipped: bool) -> Ledger:
        return gather_ledgers(self._exchange.ledger.take(), self._communicator)
