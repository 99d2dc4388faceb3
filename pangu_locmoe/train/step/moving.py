"""Experts change ranks at a step boundary, with their optimizer state: who computes them changes,
never what is computed.

Letters: L MoE layers, E experts, P slots of an expert-parallel group, or of one rank, R its ranks.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.exchange import Exchange


def expert_of_slot(model: PanguSigma) -> np.ndarray:
    """Which expert is in each slot of an expert-parallel group, int [L, P]."""
    return np.stack([layer.transport.expert_of_slot_P for layer in model.moe_layers.values()])


def move_experts(
    model: PanguSigma, optimizer: nn.Cell, exchange: Exchange, next_expert_of_slot_LP: np.ndarray
) -> None:
    """Bring every expert and its moments to the slot where `next_expert_of_slot_LP` has it; all ranks call this
    with the same.

    Args:
        model: this rank's part.
        optimizer: its AdamW.
        exchange: the way to the ranks that share the experts; its ledger counts what moves.
        next_expert_of_slot_LP: an expert for each slot, int [L, P], each row a permutation.
    """
    state = {parameter.name: parameter for parameter in optimizer.get_parameters()}
    for layer, next_expert_of_slot_P in zip(model.moe_layers.values(), next_expert_of_slot_LP):
        if np.array_equal(next_expert_of_slot_P, layer.transport.expert_of_slot_P):
            continue
        leaving_P, matrix_RR, arriving_P = _route(
            layer.transport.expert_of_slot_P,
            next_expert_of_slot_P,
            len(exchange.ranks),
            exchange.position,
        )
        for weight in (layer.experts.w_in, layer.experts.w_out):
            for parameter in (
                weight,
                state[f"adam_m.{weight.name}"],
                state[f"adam_v.{weight.name}"],
            ):
                rows_PX = ops.gather(
                    ops.reshape(parameter, (parameter.shape[0], -1)), Tensor(leaving_P), 0
                )
                rows_PX = ops.gather(exchange.move_own(rows_PX, matrix_RR), Tensor(arriving_P), 0)
                ops.assign(parameter, ops.reshape(rows_PX, parameter.shape))
        layer.transport.set_placement(next_expert_of_slot_P)


def _route(
    expert_of_slot_P: np.ndarray, next_expert_of_slot_P: np.ndarray, num_ranks: int, position: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order in which this rank's experts leave, who sends how many to whom, and where those
    that arrive belong.

    Returns:
        leaving_P: positions of this rank's experts, sorted by destination; int32.
        matrix_RR: experts from each rank to each, int64.
        arriving_P: for each of this rank's positions, which of the arrivals (sorted by source)
            takes it; int32.
    """
    own = len(expert_of_slot_P) // num_ranks
    target_P = (
        np.argsort(next_expert_of_slot_P)[expert_of_slot_P] // own
    )  # where the expert in each slot goes
    source_P = np.arange(len(expert_of_slot_P)) // own
    matrix_RR = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    np.add.at(matrix_RR, (source_P, target_P), 1)
    leaving_P = np.argsort(target_P[position * own : (position + 1) * own], kind="stable")
    arrivals_P = expert_of_slot_P[target_P == position]  # by source, and in the source's order
    arriving_P = np.argsort(arrivals_P)[
        np.searchsorted(
            np.sort(arrivals_P), next_expert_of_slot_P[position * own : (position + 1) * own]
        )
    ]
    return leaving_P.astype(np.int32), matrix_RR, arriving_P.astype(np.int32)
