"""What every router returns.

A plan is a plain dict, because a compiled MindSpore graph can carry dicts of tensors and no other record type.
"""

from __future__ import annotations

from typing import TypedDict

from mindspore import Tensor


class RoutingPlan(TypedDict):
    """Where T tokens go. Letters: T tokens, E experts, K experts a token may have (a constant of the router), A = T*K assignments.

    An assignment is one token's way to one expert. A token's K assignments follow each other, the best first; with K = 1
    they are the tokens. An assignment that was not proposed has expert 0, a row of zeros in one_hot_AE and weight 0: it has
    no slot and goes nowhere.

    expert_A: the expert of each assignment, int32.
    one_hot_AE: the same as ones and zeros, fp32; no gradient.
    probs_TE: the router's probabilities, fp32; one_hot_AE for a router without any.
    weight_A: what the expert's output is multiplied by, fp32; carries the router's gradient.
    affinity_A: how well token and expert fit, fp32, higher first when an expert is full; no gradient.
    cosine_T: cosine of the angle between a token and its (best) expert's gate, fp32; 0 for routers without a gate. No gradient.
    balance_loss, locality_loss, z_loss: fp32 scalars, not yet multiplied by their weights; 0 where the router has none.
    """

    expert_A: Tensor
    one_hot_AE: Tensor
    probs_TE: Tensor
    weight_A: Tensor
    affinity_A: Tensor
    cosine_T: Tensor
    balance_loss: Tensor
    locality_loss: Tensor
    z_loss: Tensor
