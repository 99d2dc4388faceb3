"""The router losses as pure functions of probabilities and counts.

Letters: T tokens, E experts, N source nodes.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops


def balance_loss(probs_TE: Tensor, load_E: Tensor) -> Tensor:
    """Load-balance loss, E * sum_i f_i P_i (Switch; LocMoE's L_aux without alpha). 1 when both are uniform.

    f_i is the share of tokens routed to expert i (counts, no gradient), P_i the mean probability of expert i.

    Args:
        probs_TE: router probabilities, fp32 [T, E].
        load_E: tokens routed to each expert before drops, fp32 [E].
    """
    num_tokens, num_experts = probs_TE.shape
    mean_probs_E = ops.reduce_sum(probs_TE, 0) * (1.0 / num_tokens)
    share_E = load_E * (1.0 / num_tokens)
    return ops.reduce_sum(share_E * mean_probs_E) * float(num_experts)


def local_distribution(local_NE: np.ndarray, smoothing: float) -> np.ndarray:
    """D_l of LocMoE's locality loss, fp32 [N, E]: (1-e) * uniform(local experts) + e * uniform(all).

    The published D_l is fully local, which makes the divergence infinite; smoothing keeps it finite. The row of a node
    without experts is uniform, and `locality_loss` leaves that node out.
    """
    num_experts = local_NE.shape[1]
    held_N1 = local_NE.sum(axis=1, keepdims=True)
    uniform = np.full(local_NE.shape, 1.0 / num_experts)
    local = np.where(held_N1 > 0, local_NE / np.maximum(held_N1, 1), uniform)
    return ((1 - smoothing) * local + smoothing * uniform).astype(np.float32)


def locality_loss(probs_TE: Tensor, log_local_NE: Tensor, has_experts_N: Tensor) -> Tensor:
    """Locality loss KL(D_c || D_l), mean over the source nodes that hold experts (LocMoE's L_loc without mu).

    D_c is the mean router probability over the tokens of one source node: counts have no gradient. The T tokens come
    in N equal contiguous runs, one for each source node.

    Args:
        probs_TE: router probabilities, fp32 [T, E].
        log_local_NE: logarithm of `local_distribution`, fp32 [N, E].
        has_experts_N: 1 where the node holds experts, else 0, fp32 [N].
    """
    num_nodes, num_experts = log_local_NE.shape
    tokens_per_node = probs_TE.shape[0] // num_nodes
    current_NE = ops.reduce_sum(ops.reshape(probs_TE, (num_nodes, tokens_per_node, num_experts)), 1) * (1.0 / tokens_per_node)
    # Experts outside a domain's group have probability 0, and 0 * log 0 is 0.
    divergence_N = ops.reduce_sum(current_NE * (ops.log(current_NE + 1e-20) - log_local_NE), 1)
    return ops.reduce_sum(divergence_N * has_experts_N) / ops.maximum(ops.reduce_sum(has_experts_N), 1.0)


def locality_loss_of_rank(mean_probs_E: Tensor, node_probs_E: Tensor, log_local_E: Tensor) -> Tensor:
    """One node's KL(D_c || D_l) as one of the node's ranks sees it: D_c is the mean over all ranks of the node.

    Its gradient with respect to this rank's own probabilities is that of the divergence; averaged over all ranks of the
    world, losses and gradients are those of `locality_loss` on all tokens at once.

    Args:
        mean_probs_E: mean probabilities over this rank's tokens, fp32.
        node_probs_E: mean over the ranks of the node, fp32; no gradient.
        log_local_E: logarithm of the node's `local_distribution`, fp32.
    """
    return divergence_of_rank(mean_probs_E, node_probs_E, ops.stop_gradient(ops.log(node_probs_E + 1e-20) - log_local_E))


def divergence_of_rank(mean_probs_E: Tensor, node_probs_E: Tensor, log_ratio_E: Tensor) -> Tensor:
    """`locality_loss_of_rank` from log_ratio_E = log(D_c / D_l), which has no gradient."""
    slope = ops.reduce_sum((log_ratio_E + 1.0) * mean_probs_E)
    value = ops.reduce_sum(node_probs_E * log_ratio_E)
    return slope + ops.stop_gradient(value - slope)


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-partition of the gate's logits (ST-MoE), which keeps them small. fp32 scalar."""
    peak_T1 = ops.stop_gradient(ops.ReduceMax(keep_dims=True)(logits_TE, 1))
    log_partition_T1 = ops.log(ops.ReduceSum(keep_dims=True)(ops.exp(logits_TE - peak_T1), 1)) + peak_T1
    return ops.reduce_sum(log_partition_T1 * log_partition_T1) * (1.0 / logits_TE.shape[0])
