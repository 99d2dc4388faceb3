"""The router losses as pure functions of probabilities and counts.

Letters: T tokens, E experts, N source nodes.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops


def balance_loss(probs_NE: Tensor, load_NE: Tensor) -> Tensor:
    """Load-balance loss, E * sum_i f_i P_i (Switch; LocMoE's L_aux without alpha).

    1 when both are uniform.

    f_i is the share of assignments to expert i (counts, no gradient), P_i the mean probability of
    expert i.

    Args:
        probs_NE: mean router probabilities over the tokens of each node, all of which have as many,
            fp32.
        load_NE: assignments from each node to each expert before drops, fp32.

    Raises:
        ValueError: load_NE is of one dimension, as this loss once took it inside of a router.
    """
    if load_NE.ndim != 2:
        raise ValueError(
            "balance_loss takes the means and counts of all nodes, which a router does not "
            "have: leave balance_loss out of "
            "the plan, and the layer computes it (docs/routing.md, A router of your own)"
        )
    num_nodes, num_experts = probs_NE.shape
    mean_probs_E = ops.reduce_sum(probs_NE, 0) * (1.0 / num_nodes)
    load_E = ops.reduce_sum(load_NE, 0)
    share_E = load_E / ops.maximum(ops.reduce_sum(load_E), 1.0)
    return ops.reduce_sum(share_E * mean_probs_E) * float(num_experts)


def local_distribution(local_NE: np.ndarray, smoothing: float) -> np.ndarray:
    """D_l of LocMoE's locality loss, fp32 [N, E]: (1-e) * uniform(local experts) + e *
    uniform(all).

    The published D_l is fully local, which makes the divergence infinite; smoothing keeps it
    finite. The row of a node without experts is uniform, and `locality_loss` leaves that node out.
    """
    num_experts = local_NE.shape[1]
    held_N1 = local_NE.sum(axis=1, keepdims=True)
    uniform = np.full(local_NE.shape, 1.0 / num_experts)
    local = np.where(held_N1 > 0, local_NE / np.maximum(held_N1, 1), uniform)
    return ((1 - smoothing) * local + smoothing * uniform).astype(np.float32)


def locality_loss(
    probs_NE: Tensor, log_probs_NE: Tensor, log_local_NE: Tensor, has_experts_N: Tensor
) -> Tensor:
    """Locality loss KL(D_c || D_l), mean over the source nodes that hold experts (LocMoE's L_loc
    without mu).

    D_c is the mean router probability over the tokens of one source node: counts have no gradient.

    Args:
        probs_NE: D_c, fp32.
        log_probs_NE: its logarithm (`log_of`), fp32; no gradient.
        log_local_NE: logarithm of `local_distribution`, fp32.
        has_experts_N: 1 where the node holds experts, else 0, fp32.
    """
    ratio_NE = log_probs_NE - log_local_NE
    sum_N = ops.reduce_sum(probs_NE, 1)
    # The logarithm's own slope, p * 1/p = 1 for each probability, comes from a term that is zero.
    divergence_N = ops.reduce_sum(probs_NE * ratio_NE, 1) + (sum_N - ops.stop_gradient(sum_N))
    return ops.reduce_sum(divergence_N * has_experts_N) / ops.maximum(
        ops.reduce_sum(has_experts_N), 1.0
    )


def log_of(probs_NE: Tensor) -> Tensor:
    """Logarithm without a gradient; finite: experts outside a domain's group have probability 0,
    and 0 * log 0 is 0.
    """
    return ops.stop_gradient(ops.log(probs_NE + 1e-20))


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-partition of the gate's logits (ST-MoE), which keeps them small. fp32
    scalar.
    """
    peak_T1 = ops.stop_gradient(ops.ReduceMax(keep_dims=True)(logits_TE, 1))
    log_partition_T1 = (
        ops.log(ops.ReduceSum(keep_dims=True)(ops.exp(logits_TE - peak_T1), 1)) + peak_T1
    )
    return ops.reduce_sum(log_partition_T1 * log_partition_T1) * (1.0 / logits_TE.shape[0])
