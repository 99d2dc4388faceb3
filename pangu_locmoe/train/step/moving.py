"""Experts change ranks at a step boundary, with their optimizer state: who computes them changes,
never what is computed.

Letters: L MoE layers, E experts and as many slots of an expert-parallel group, R its ranks, G = E /
R slots of a rank.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.exchange import Exchange


def expert_of_slot(model: PanguSigma) -> np.ndarray:
    """Which expert is in each slot of an expert-parallel group, int [L, E]."""
    return np.stack([layer.transport.expert_of_slot_E for layer in model.moe_layers.values()])


def move_experts(
    model: PanguSigma, optimizer: nn.Cell, exchange: Exchange, wanted_LE: np.ndarray
) -> None:
    """Bring every expert and its moments to the slot where `wanted_LE` has it; all ranks call this
    with the same.

    Args:
        model: this rank's part.
        optimizer: its AdamW.
        exchange: the way to the ranks that share the experts; its ledger counts what moves.
        wanted_LE: an expert for each slot, int [L, E], each row a permutation.
    """
    state = {parameter.name: parameter for parameter in optimizer.get_parameters()}
    for layer, wanted_E in zip(model.moe_layers.values(), wanted_LE):
        if np.array_equal(wanted_E, layer.transport.expert_of_slot_E):
            continue
        leaving_G, matrix_RR, arriving_G = _route(
            layer.transport.expert_of_slot_E, wanted_E, len(exchange.ranks), exchange.place
        )
        for weight in (layer.experts.w_in, layer.experts.w_out):
            for parameter in (
                weight,
                state[f"adam_m.{weight.name}"],
                state[f"adam_v.{weight.name}"],
            ):
                rows_GX = ops.gather(
                    ops.reshape(parameter, (parameter.shape[0], -1)), Tensor(leaving_G), 0
                )
                rows_GX = ops.gather(exchange.move_own(rows_GX, matrix_RR), Tensor(arriving_G), 0)
                ops.assign(parameter, ops.reshape(rows_GX, parameter.shape))
        layer.transport.place(wanted_E)


def _route(
    now_E: np.ndarray, wanted_E: np.ndarray, num_ranks: int, place: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order in which this rank's experts leave, who sends how many to whom, and where those
    that arrive belong.

    Returns:
        leaving_G: places of this rank's experts, sorted by destination; int32.
        matrix_RR: experts from each rank to each, int64.
        arriving_G: for each of this rank's places, which of the arrivals (sorted by source) takes
            it; int32.
    """
    own = len(now_E) // num_ranks
    target_E = np.argsort(wanted_E)[now_E] // own  # where the expert in each slot goes
    source_E = np.arange(len(now_E)) // own
    matrix_RR = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    np.add.at(matrix_RR, (source_E, target_E), 1)
    leaving_G = np.argsort(target_E[place * own : (place + 1) * own], kind="stable")
    arrivals_G = now_E[target_E == place]  # by source, and in the source's order
    arriving_G = np.argsort(arrivals_G)[
        np.searchsorted(np.sort(arrivals_G), wanted_E[place * own : (place + 1) * own])
    ]
    return leaving_G.astype(np.int32), matrix_RR, arriving_G.astype(np.int32)
