"""The routers' biases follow the load (moe.balance: bias and quantile).

They are in the model's checkpoint: this policy has no state of its own.

Letters: L MoE layers, N source nodes, E experts, J domains, X options of a router.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, Mapping

import numpy as np
from mindspore import Tensor

from pangu_locmoe.config import Config
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.routers import router_class
from pangu_locmoe.train.metrics import Row
from pangu_locmoe.train.step import Stepper, StepResult

RATE = 0.001


class Balance:
    """Each layer's bias, step by step.

    bias: plus or minus moe.bias_rate for an option with less or more than the mean load (DeepSeek,
    arXiv 2408.15664, algorithm 1), the mean being that of a domain's group. quantile: what the
    step found (moe/balance.py).

    Args:
        config: the run.
        stepper: of the model whose routers have the biases.
    """

    def __init__(self, config: Config, stepper: Stepper) -> None:
        self._routers = [layer.router for layer in stepper.model.moe_layers.values()]
        self._rate = RATE if config.moe.bias_rate is None else config.moe.bias_rate
        self._allowed_JE = allowed_experts(config)
        self._options_EX = router_class(config).options(config)  # type: ignore[attr-defined]

    @staticmethod
    def wanted(config: Config) -> bool:
        """Whether the routers have biases."""
        if config.moe.balance == "loss" or config.model.num_moe_layers == 0:
            return False
        return router_class(config).traits.has_balance_bias

    def __call__(self, step: int, result: StepResult) -> Iterator[Row]:
        if not result.skipped:
            for layer, router in enumerate(self._routers):
                router.bias.set_data(Tensor(self._next(layer, router, result)))
        yield from ()

    def state(self) -> Dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        return None

    def _next(self, layer: int, router: Any, result: StepResult) -> np.ndarray:
        if result.bias_LX is not None:
            return result.bias_LX[layer]
        load_E = result.load_LNE[layer].sum(axis=0)
        allowed_JE = self._allowed_JE  # each expert is in one domain's group, or all in all
        group_load_J = allowed_JE @ load_E / allowed_JE.sum(axis=1)
        due_E = group_load_J[allowed_JE.argmax(axis=0)]
        change_X = np.sign((due_E - load_E) @ self._options_EX)
        return (router.bias.asnumpy() + self._rate * change_X).astype(np.float32)
