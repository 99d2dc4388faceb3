"""Compiles the front end of one rank's training step on a machine without devices. A process of its
own: it leaves MindSpore unfit for anything else. `python -m pangu_locmoe.check.compile CONFIG.json
RESULT.json`.

The step's parameters have shapes but no values here, so that a large configuration takes no memory.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Zero
from mindspore.nn.utils import no_init_parameters
from mindspore.ops.operations import comm_ops

from pangu_locmoe.check.graph import communication, host_python
from pangu_locmoe.config import Config, parse_config
from pangu_locmoe.model import attention, block, sigma
from pangu_locmoe.moe import dispatch
from pangu_locmoe.moe import layer as moe_layer
from pangu_locmoe.nn import flash_attention as fused
from pangu_locmoe.nn import functional
from pangu_locmoe.parallel import tensor as slices
from pangu_locmoe.parallel.gradients import kind, pieces
from pangu_locmoe.parallel.hccl import HcclOperators
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train import optimizer
from pangu_locmoe.train.step import Objective, cells
from pangu_locmoe.train.step.cells import StepParts
from pangu_locmoe.train.step.graph import RECURSION_LIMIT, graph_parts

_NUMBER = Tensor(1.0, ms.float32)


def compile_step(config: Config, num_ranks: int, rank: int) -> Dict[str, Any]:
    """The communication operators of a rank's step, what it has Python compute, how often it has
    flash attention (forward, backward), its groups and its weights.
    """
    without_values()
    for module in (fused, dispatch, functional):  # what is compiled is for one
        module.on_ascend = lambda: True  # type: ignore[attr-defined]
    communicator = HcclOperators(rank, num_ranks, lambda name, ranks: None)
    # Nothing has joined a job: without this, MindSpore takes every group for the whole world.
    comm_ops.get_group_size = lambda group: len(communicator.groups[group])
    comm_ops.get_rank = lambda group: communicator.groups[group].index(rank)
    step = RankStep.of(config, communicator)
    texts = [_front_end(step.first, step.inputs)]
    if step.parts.buffers is not None:
        norm, apply, _ = step.parts.after()
        texts += [
            _front_end(norm, (_NUMBER,)),
            _front_end(apply, (_NUMBER, Tensor(1, ms.int32), _NUMBER)),
        ]
    text = "\n".join(texts)
    return {
        "operations": [operation.to_dict() for operation in communication(text)],
        "host_python": host_python(text),
        "flash_attention": [
            text.count(f"= PrimFunc_{name}(")
            for name in ("FlashAttentionScore", "FlashAttentionScoreGrad")
        ],
        "groups": {name: list(ranks) for name, ranks in communicator.groups.items()},
        "weights": step.weights(),
    }


@dataclass(frozen=True)
class RankStep:
    """The cells of one rank's step, and what they are called with.

    parameters: the rank's trainable ones.
    first: the step, or with buffers the part of it that fills them.
    inputs: of `first`.
    """

    parts: StepParts
    parameters: List[Parameter]
    first: nn.Cell
    inputs: Tuple[Tensor, ...]

    @classmethod
    def of(cls, config: Config, communicator: HcclOperators) -> RankStep:
        """Of the communicator's rank, its parameters without values."""
        ms.set_recursion_limit(RECURSION_LIMIT)
        world = World.of(config, communicator)
        topology = world.topology
        with no_init_parameters():
            model = sigma.PanguSigma(config, None, topology, world.exchange, world.tensor)
            parameters = list(model.trainable_params())
            own = None
            if config.parallel.shard_optimizer:
                own = pieces(parameters, topology, communicator.rank)
            adam = optimizer.AdamW.of(parameters, config.train, own)
            parts = graph_parts(config, adam, topology, communicator)
        # Not used with static sizes, but for not being dropless.
        capacities = (1,) * config.model.num_moe_layers
        first = parts.step(Objective(model, config, capacities))
        return cls(parts, parameters, first, _inputs(config, topology.num_replicas))

    def weights(self) -> List[Dict[str, Any]]:
        """Name, shape and kind of each parameter."""
        return [
            {"name": parameter.name, "shape": list(parameter.shape), "kind": kind(parameter)}
            for parameter in self.parameters
        ]


def _front_end(cell: nn.Cell, inputs: Tuple[Tensor, ...]) -> str:
    from mindspore._c_expression import dump_func_graph
    from mindspore.graph.api import _frontend_compile

    return str(dump_func_graph(_frontend_compile(cell)(*inputs).func_graph))


def _inputs(config: Config, num_replicas: int) -> Tuple[Tensor, ...]:
    """Of the step, or with buffers, where only the objective's are needed, of a micro-batch."""
    batch = config.micro_batch // num_replicas
    length = config.model.seq_length

    def integers(*shape: int) -> Tensor:
        return Tensor(np.zeros(shape, np.int32))

    rows = [integers(batch, length) for _ in range(4)]
    keys = (integers(batch), integers(batch * length), integers(config.model.hidden_size))
    inputs = (*rows, *keys, _NUMBER)
    return inputs if config.train.has_buffers else (_NUMBER, Tensor(1, ms.int32), *inputs)


def without_values() -> None:
    """In this process, weights and optimizer state are shapes only."""

    def shape_only(seed: Any, shape: Tuple[int, ...], std: float) -> np.ndarray:
        return np.broadcast_to(np.float32(0), shape)

    def tensor(value: Any, *arguments: Any, **keywords: Any) -> Tensor:
        if isinstance(value, np.ndarray) and value.ndim and not any(value.strides):
            return Tensor(shape=value.shape, dtype=ms.float32, init=Zero())
        return Tensor(value, *arguments, **keywords)

    def expert_weights(config: Config, layer: int, held: np.ndarray) -> List[np.ndarray]:
        hidden = config.model.hidden_size
        inner = config.model.ffn_size
        return [
            np.broadcast_to(np.float32(0), (len(held), *shape))
            for shape in ((hidden, inner), (inner, hidden))
        ]

    def zeros(shape: Tuple[int, ...], name: str) -> Parameter:
        return Parameter(
            Tensor(shape=shape, dtype=ms.float32, init=Zero()), name=name, requires_grad=False
        )

    for module in (attention, block, sigma):
        module.normal = shape_only  # type: ignore[attr-defined]
    for module in (block, sigma, slices):
        module.Tensor = tensor  # type: ignore[attr-defined,assignment]
    moe_layer.expert_weights = expert_weights  # type: ignore[attr-defined,assignment]
    for module in (optimizer, cells):
        module.zeros = zeros  # type: ignore[attr-defined]


def main(arguments: List[str]) -> int:
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    os.environ["RANK_SIZE"], os.environ["RANK_ID"] = str(request["ranks"]), str(request["rank"])
    result = compile_step(parse_config(request["config"]), request["ranks"], request["rank"])
    Path(arguments[1]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
