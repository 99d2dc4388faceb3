"""What every router returns, and what the ranks of a job know of a layer together.

Both are plain dicts, because a compiled MindSpore graph can carry dicts of tensors and no other
record type.
"""

from __future__ import annotations

from typing import Dict, TypedDict

import numpy as np
from mindspore import Tensor

ROUTING = ("expert_A", "one_hot_AE", "probs_TE", "weight_A", "affinity_A", "cosine_T")
"""What every plan has."""

LOSSES = ("balance_loss", "locality_loss", "z_loss")
"""The losses that a plan may have."""


class _Routing(TypedDict):
    expert_A: Tensor
    one_hot_AE: Tensor
    probs_TE: Tensor
    weight_A: Tensor
    affinity_A: Tensor
    cosine_T: Tensor


class RoutingPlan(_Routing, total=False):
    """Where T tokens go.

    Letters: T tokens, E experts, K experts a token may have (a constant of the router), A = T*K
    assignments.

    An assignment is one token's way to one expert. A token's K assignments follow each other, the
    best first; with K = 1 they are the tokens. An assignment that was not proposed has expert 0, a
    row of zeros in one_hot_AE and weight 0: it has no slot and goes nowhere.

    expert_A: the expert of each assignment, int32.
    one_hot_AE: the same as ones and zeros, fp32; no gradient.
    probs_TE: the router's probabilities, fp32; one_hot_AE for a router without any.
    weight_A: what the expert's output is multiplied by, fp32; carries the router's gradient.
    affinity_A: how well token and expert fit, fp32, higher first when an expert is full; no
    gradient.
    cosine_T: cosine of the angle between a token and its (best) expert's gate, fp32; 0 for routers
        without a gate. No gradient.

    balance_loss, locality_loss, z_loss: the router's own, fp32 scalars, not yet multiplied by their
        weights; each may be left out. A loss of the plan is a mean over its tokens, and with
        several ranks it is averaged over them: so it is the same on any number of ranks. It takes
        the place of what `Router.losses_of` computes.
    """

    balance_loss: Tensor
    locality_loss: Tensor
    z_loss: Tensor


def with_losses(plan: RoutingPlan, losses: Dict[str, Tensor]) -> RoutingPlan:
    """The plan with these losses as the router's own, whether it had them or not.

    `plan[name] = loss` would do without a compiler; MindSpore's has no gradient for a dict that is
    added to.
    """
    return {  # type: ignore[return-value]
        name: losses[name] if name in losses else plan[name]  # type: ignore[literal-required]
        for name in (*ROUTING, *LOSSES)
        if name in losses or name in plan
    }


class _Shared(TypedDict):
    load_NE: Tensor
    probs_NE: Tensor
    log_probs_NE: Tensor


class Shared(_Shared, total=False):
    """What all ranks know of a layer in a step. Letters: N source nodes, E experts, U replicas.

    load_NE: assignments from each node to each expert before drops, fp32; no gradient.
    probs_NE: mean of probs_TE over each node's tokens, fp32. In `losses_of` its gradient is that of
        this rank's, so large that the mean over ranks is that of all tokens: a loss computed from
        probs_NE has the
        value and, averaged over ranks, the gradient that one process has.
    log_probs_NE: logarithm of probs_NE, finite, fp32; no gradient.
    counts_UE: where exactly the routed tokens travel, assignments of each replica's tokens to each
        expert, int64, on the host.
    """

    counts_UE: np.ndarray
