"""Switch: a learned dense gate with the balance loss, an optional z-loss and jitter."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.moe import gate
from pangu_locmoe.moe.routers.base import GatedRouter, RouterContext
from pangu_locmoe.nn import noise as noises
from pangu_locmoe.nn.noise import Noise


class SwitchRouter(GatedRouter, name="switch"):
    """G_i = w_i . x, top-1, scaled by its probability (Switch Transformer; LocMoE's baseline)."""

    traits = ROUTER_TRAITS["switch"]

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        # Each router draws from a generator of its own, so that the trunk's initial weights do not
        # depend on the router.
        generator = np.random.default_rng([config.train.seed, 1, context.layer])
        shape = (config.moe.num_experts, config.model.hidden_size)
        self.w_ED = Parameter(
            Tensor(generator.normal(0.0, config.model.init_std, shape).astype(np.float32)), name="w"
        )
        self.jitter = config.moe.jitter
        self.site = 1000 + context.layer

    @classmethod
    def num_params(cls, config: Config) -> int:
        return config.moe.num_experts * config.model.hidden_size + super().num_params(config)

    @classmethod
    def cut(
        cls, config: Config, name: str, array: np.ndarray, domain: int, experts: range
    ) -> np.ndarray:
        if name == "w_ED":
            return array[experts.start : experts.stop]
        return super().cut(config, name, array, domain, experts)

    def logits(self, x_TD: Tensor, noise: Noise, training: bool) -> Tensor:
        if training and self.jitter > 0:
            x_TD = x_TD * (1.0 + self.jitter * (2.0 * noises.uniform(noise, self.site) - 1.0))
        return gate.dense_logits(x_TD, self.w_ED)

    def cosine(self, x_TD: Tensor, logits_TE: Tensor, expert_T: Tensor) -> Tensor:
        return gate.dense_cosine(x_TD, self.w_ED, logits_TE, expert_T)
