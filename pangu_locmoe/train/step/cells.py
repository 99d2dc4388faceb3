"""A step in several compiled parts: gradients are added up in buffers, and what to do with them is decided after a look at their norm.

Accumulation needs it, and fp16's loss scaling.
"""

from __future__ import annotations

from typing import Dict, Sequence, Tuple

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from pangu_locmoe.train.optimizer import AdamW, zeros


def gradient_buffers(parameters: Sequence[Parameter]) -> ParameterTuple:
    """Zeros for each parameter's gradient, fp32."""
    return ParameterTuple([zeros(parameter.shape, f"gradient.{parameter.name}") for parameter in parameters])


class Accumulate(nn.Cell):
    """Forward, backward, and add the gradients to buffers."""

    def __init__(self, objective: nn.Cell, parameters: ParameterTuple, buffers: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.gradient = ms.value_and_grad(objective, None, parameters, has_aux=True)
        self.buffers, self.count = buffers, len(buffers)

    def construct(self, *inputs: Tensor) -> Tuple[Tensor, Dict[str, Tensor]]:
        """`inputs` as for the objective. Returns the losses and the statistics."""
        (_, losses, stats), gradients = self.gradient(*inputs)
        for index in range(self.count):
            ops.assign_add(self.buffers[index], gradients[index])
        return losses, stats


class BufferedNorm(nn.Cell):
    """Global norm of the buffered gradients."""

    def __init__(self, optimizer: AdamW, buffers: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer, self.buffers = optimizer, buffers

    def construct(self) -> Tensor:
        return ops.sqrt(self.optimizer.squared_norm(self.buffers))


class BufferedUpdate(nn.Cell):
    """Update from the buffers and clear them, or only clear them."""

    def __init__(self, optimizer: AdamW, buffers: ParameterTuple, apply: bool) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer, self.buffers, self.apply_update = optimizer, buffers, apply

    def construct(self, factor: Tensor, norm: Tensor, learning_rate: Tensor, step: Tensor) -> Tensor:
        if self.apply_update:
            gradients = []
            for buffer in self.buffers:
                gradients.append(buffer * factor)
            self.optimizer.update(tuple(gradients), learning_rate, step, norm)
        for buffer in self.buffers:
            ops.assign(buffer, ops.zeros_like(buffer))
        return norm
