"""The compiled parts of a step: one graph, or those before and after a look at the gradient's norm.

Accumulation needs that look, and so does fp16's loss scaling: then gradients are added up in
buffers, and what to do with them is decided on the host. What is done with gradients in between,
the reduction, is handed in: a single process has nothing to reduce, the ranks of a job have HCCL's
operators (reduction.py).
"""

from __future__ import annotations

from typing import Dict, Optional, Sequence, Tuple

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from pangu_locmoe.config.models import TrainConfig
from pangu_locmoe.train.optimizer import AdamW, zeros
from pangu_locmoe.train.step.objective import Objective


class StepParts:
    """The cells of a step.

    Args:
        train: whether there are buffers.
        optimizer: of this process's parameters.
        reduce: gradients, and a factor or None -> reduced gradients and the norm of the whole
            gradient, as `ReduceAlone`.
        gather: as of `Update`.
    """

    def __init__(
        self,
        train: TrainConfig,
        optimizer: AdamW,
        reduce: nn.Cell,
        gather: Optional[nn.Cell] = None,
    ) -> None:
        self.optimizer = optimizer
        self.reduce = reduce
        self.update = Update(optimizer, gather)
        self.buffers: Optional[ParameterTuple] = None
        if train.has_buffers:
            self.buffers = gradient_buffers(optimizer.parameters)
            self.reduced = reduced_buffers(optimizer, self.buffers)

    def step(self, objective: Objective) -> nn.Cell:
        """The step, or with buffers the part of it that fills them."""
        if self.buffers is None:
            return WholeStep(objective, self.optimizer, self.reduce, self.update)
        return Accumulate(objective, self.optimizer.parameters, self.buffers)

    def after(self) -> Tuple[nn.Cell, nn.Cell, nn.Cell]:
        """With buffers: the norm, the update, and what to do instead of it."""
        assert self.buffers is not None
        apply, clear = (
            UpdateFromBuffers(self.update, self.buffers, self.reduced, apply)
            for apply in (True, False)
        )
        return ReduceBuffers(self.reduce, self.buffers, self.reduced), apply, clear


class WholeStep(nn.Cell):
    """Forward, backward, reduction and update in one graph.

    Statistics leave it in a tuple, in the order of `model.stats_names`: on Ascend a dict that leaves
    a graph is made by Python on the host, which cuts the graph into parts.
    """

    def __init__(
        self, objective: Objective, optimizer: AdamW, reduce: nn.Cell, update: nn.Cell
    ) -> None:
        super().__init__(auto_prefix=False)
        self.gradient = ms.value_and_grad(objective, None, optimizer.parameters, has_aux=True)
        self.reduce = reduce
        self.update = update
        self.names = objective.model.stats_names

    def construct(
        self, learning_rate: Tensor, step: Tensor, *inputs: Tensor
    ) -> Tuple[Tensor, Tuple[Tensor, ...], Tensor]:
        """`inputs` as for the objective.

        Returns:
            this process's losses and statistics, and the norm of the whole gradient.
        """
        (_, losses, stats), gradients = self.gradient(*inputs)
        reduced, norm = self.reduce(gradients, None)
        self.update(reduced, learning_rate, step, norm)
        return losses, _values(stats, self.names), norm


class ReduceAlone(nn.Cell):
    """The reduction of a single process: its gradients are those of the job."""

    def __init__(self, optimizer: AdamW) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer

    def construct(
        self, gradients: Tuple[Tensor, ...], factor: Optional[Tensor]
    ) -> Tuple[Tuple[Tensor, ...], Tensor]:
        """Returns the gradients times `factor`, and their norm.

        Without a factor, which is a constant of the graph, nothing is multiplied: it would be one
        more pass over all gradients.
        """
        if factor is not None:
            scaled = []
            for gradient in gradients:
                scaled.append(gradient * factor)
            gradients = tuple(scaled)
        return gradients, ops.sqrt(self.optimizer.squared_norm(gradients))


class Update(nn.Cell):
    """AdamW from reduced gradients; then parameters are put together from the pieces of all ranks.

    Args:
        optimizer: of this process's parameters.
        gather: what makes the parameters of `updated`; None where none is divided.
    """

    def __init__(self, optimizer: AdamW, gather: Optional[nn.Cell] = None) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.gather = gather
        self.divided = optimizer.divided
        self.count = len(optimizer.parameters)
        self.parameters = optimizer.parameters
        self.updated = optimizer.updated

    def construct(
        self, gradients: Tuple[Tensor, ...], learning_rate: Tensor, step: Tensor, norm: Tensor
    ) -> Tensor:
        self.optimizer.update(gradients, learning_rate, step, norm)
        if self.gather is not None:
            whole = self.gather(tuple(self.updated))
            for index in range(self.count):
                if self.divided[index]:
                    ops.assign(self.parameters[index], whole[index])
        return norm


class Accumulate(nn.Cell):
    """Forward, backward, and add the gradients to buffers. Statistics as of `WholeStep`."""

    def __init__(
        self, objective: Objective, parameters: ParameterTuple, buffers: ParameterTuple
    ) -> None:
        super().__init__(auto_prefix=False)
        self.gradient = ms.value_and_grad(objective, None, parameters, has_aux=True)
        self.buffers = buffers
        self.count = len(buffers)
        self.names = objective.model.stats_names

    def construct(self, *inputs: Tensor) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        """`inputs` as for the objective. Returns the losses and the statistics."""
        (_, losses, stats), gradients = self.gradient(*inputs)
        for index in range(self.count):
            ops.assign_add(self.buffers[index], gradients[index])
        return losses, _values(stats, self.names)


class ReduceBuffers(nn.Cell):
    """The reduction of gradients that were added up in buffers; the result stays in `reduced`."""

    def __init__(self, reduce: nn.Cell, buffers: ParameterTuple, reduced: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.reduce = reduce
        self.buffers = buffers
        self.reduced = reduced
        self.count = len(buffers)

    def construct(self, factor: Tensor) -> Tensor:
        """Returns the norm of the whole gradient times `factor`."""
        gradients, norm = self.reduce(tuple(self.buffers), factor)
        for index in range(self.count):
            ops.assign(self.reduced[index], gradients[index])
        return norm


class UpdateFromBuffers(nn.Cell):
    """Update from reduced gradients and clear the buffers, or only clear them."""

    def __init__(
        self, update: nn.Cell, buffers: ParameterTuple, reduced: ParameterTuple, apply: bool
    ) -> None:
        super().__init__(auto_prefix=False)
        self.update = update
        self.buffers = buffers
        self.reduced = reduced
        self.apply_update = apply

    def construct(self, learning_rate: Tensor, step: Tensor, norm: Tensor) -> Tensor:
        if self.apply_update:
            self.update(tuple(self.reduced), learning_rate, step, norm)
        for buffer in self.buffers:
            ops.assign(buffer, ops.zeros_like(buffer))
        return norm


def _values(stats: Dict[str, Tensor], names: Tuple[str, ...]) -> Tuple[Tensor, ...]:
    values = []
    for name in names:
        values.append(stats[name])
    return tuple(values)


def gradient_buffers(parameters: Sequence[Parameter]) -> ParameterTuple:
    """Zeros for each parameter's gradient, fp32."""
    return ParameterTuple([zeros(p.shape, f"gradient.{p.name}") for p in parameters])


def reduced_buffers(optimizer: AdamW, buffers: ParameterTuple) -> ParameterTuple:
    """Where reduced gradients stay: where they come from, but pieces in buffers of their own."""
    results = zip(buffers, optimizer.updated, optimizer.divided)
    return ParameterTuple(
        [
            zeros(updated.shape, f"reduced.{updated.name}") if divided else buffer
            for buffer, updated, divided in results
        ]
    )
