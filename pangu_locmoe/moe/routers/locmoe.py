"""LocMoE: grouped average pooling as the gate, with the balance and the locality loss."""

from __future__ import annotations

from collections.abc import Iterator

from mindspore import Tensor

from pangu_locmoe.config import Config
from pangu_locmoe.moe import gate
from pangu_locmoe.moe.routers.base import GatedRouter, RouterContext
from pangu_locmoe.noise import Noise


class LocMoERouter(GatedRouter, name="locmoe"):
    """G_i = scale * mean of the i-th block of features: a gate without parameters (LocMoE, GrAP)."""

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        hidden_size, num_experts = config.model.hidden_size, config.moe.num_experts
        self.scale = config.moe.gate_scale or (hidden_size / num_experts) ** 0.5
        self.pooling = gate.GroupedAveragePooling(num_experts)

    @classmethod
    def broken_rules(cls, config: Config) -> Iterator[tuple[str, str]]:
        yield from super().broken_rules(config)
        if config.model.num_moe_layers and config.model.hidden_size % config.moe.num_experts:
            yield "model.hidden_size", f"must be divisible by moe.num_experts ({config.moe.num_experts}) for GrAP's blocks of features"

    def logits(self, x_TD: Tensor, noise: Noise, training: bool) -> Tensor:
        return self.pooling(x_TD) * self.scale

    def cosine(self, x_TD: Tensor, logits_TE: Tensor, expert_T: Tensor) -> Tensor:
        return gate.grap_cosine(x_TD, logits_TE, expert_T, self.scale)
