"""LocMoE: grouped average pooling as the gate, with the balance and the locality loss."""

from __future__ import annotations

from mindspore import Tensor

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.moe import gate
from pangu_locmoe.moe.routers.base import GatedRouter, RouterContext
from pangu_locmoe.nn.noise import Noise


class LocMoERouter(GatedRouter, name="locmoe"):
    """G_i = scale * mean of the i-th block of features: a gate without parameters (LocMoE,
    GrAP).
    """

    traits = ROUTER_TRAITS["locmoe"]

    def __init__(self, config: Config, context: RouterContext) -> None:
        super().__init__(config, context)
        # A sub-model cut out of a larger one pools over the larger one's blocks and uses its own
        # experts' among them.
        cut_from = config.moe.cut_from
        hidden_size = config.model.hidden_size
        self.first = cut_from.first_expert if cut_from is not None else 0
        gate_experts = cut_from.num_experts if cut_from is not None else config.moe.num_experts
        self.scale = config.moe.gate_scale or (hidden_size / gate_experts) ** 0.5
        self.gate_norm = (gate_experts / hidden_size) ** 0.5
        self.pooling = gate.GroupedAveragePooling(gate_experts)

    def logits(self, x_TD: Tensor, noise: Noise, training: bool) -> Tensor:
        return self.pooling(x_TD)[:, self.first : self.first + self.num_experts] * self.scale

    def cosine(self, x_TD: Tensor, logits_TE: Tensor, expert_T: Tensor) -> Tensor:
        return gate.grap_cosine(x_TD, logits_TE, expert_T, self.scale * self.gate_norm)
