"""What every router returns.

A plan is a plain dict, because a compiled MindSpore graph can carry dicts of tensors and no other record type.
"""

from __future__ import annotations

from typing import TypedDict

from mindspore import Tensor


class RoutingPlan(TypedDict):
    """Where T tokens go. Letters: T tokens, E experts.

    expert_T: the expert of each token, int32.
    one_hot_TE: the same as ones and zeros, fp32; no gradient.
    probs_TE: the router's probabilities, fp32; one_hot_TE for a router without any.
    weight_T: what the expert's output is multiplied by, fp32; carries the router's gradient.
    affinity_T: how well token and expert fit, fp32, higher first when an expert is full; no gradient.
    cosine_T: cosine of the angle between a token and its expert's gate, fp32; 0 for routers without a gate. No gradient.
    balance_loss, locality_loss, z_loss: fp32 scalars, not yet multiplied by their weights; 0 where the router has none.
    """

    expert_T: Tensor
    one_hot_TE: Tensor
    probs_TE: Tensor
    weight_T: Tensor
    affinity_T: Tensor
    cosine_T: Tensor
    balance_loss: Tensor
    locality_loss: Tensor
    z_loss: Tensor
