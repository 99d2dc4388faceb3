"""What an expert's tokens have in common, and experts that get hardly any.

NumPy only, but for `similarities`.

Letters: T tokens, D hidden, E experts, K rows of a trace, L sparse layers.
"""

from __future__ import annotations

from typing import Any, List, Tuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HARDLY = 0.1  # of an even share


def unused_fraction(load_WLE: Array, hardly: float = HARDLY) -> float:
    """Share of experts, over all layers, that get less than `hardly` of an even share of these
    rows' tokens.
    """
    share_LE = load_WLE.sum(axis=0) / np.maximum(load_WLE.sum(axis=(0, 2)), 1)[:, None]
    return float((share_LE < hardly / load_WLE.shape[2]).mean())


def mean_cosines(x_TD: Array, expert_T: Array) -> Tuple[float, float]:
    """Mean cosine of two different tokens of the same expert, and of two tokens of different
    experts.

    Over all pairs, without making them: the sum of the cosines in a set of unit vectors is the
    squared length of their sum. The means are taken over the pairs of all experts together; NaN
    where there is no pair.
    """
    unit_TD = x_TD / np.maximum(np.linalg.norm(x_TD, axis=1, keepdims=True), 1e-12)
    sums_ED = np.stack([unit_TD[expert_T == expert].sum(axis=0) for expert in np.unique(expert_T)])
    counts_E = np.array([(expert_T == expert).sum() for expert in np.unique(expert_T)], float)
    inside = float(np.square(sums_ED).sum())
    total = float(np.square(sums_ED.sum(axis=0)).sum())
    tokens = float(len(expert_T))
    pairs = float((counts_E * (counts_E - 1)).sum())
    others = tokens**2 - float(np.square(counts_E).sum())
    within = (inside - tokens) / pairs if pairs else float("nan")
    across = (total - inside) / others if others else float("nan")
    return within, across


def mean_gate_cosine(w_ED: Array) -> float:
    """Mean absolute cosine of two different gate vectors: 0 for orthogonal ones."""
    unit_ED = w_ED / np.maximum(np.linalg.norm(w_ED, axis=1, keepdims=True), 1e-12)
    gram_EE = np.abs(unit_ED @ unit_ED.T)
    experts = len(gram_EE)
    return float((gram_EE.sum() - np.trace(gram_EE)) / (experts * (experts - 1)))


def similarities(
    model: Any, config: Any, prepared: Any, sequences: int
) -> List[Tuple[float, float]]:
    """`mean_cosines` of each sparse layer on validation text: what its router sees, and where it
    sends it.

    Args:
        model: a PanguSigma.
        config, prepared: its configuration and data.
        sequences: of each domain.
    """
    from mindspore import Tensor, ops
    from mindspore.common import dtype as mstype

    from pangu_locmoe.data.loader import validation_batches
    from pangu_locmoe.moe.capacity import DROPLESS

    key = Tensor(np.zeros(1, np.int32))
    x_LTD: List[List[Array]] = [[] for _ in range(config.model.num_moe_layers)]
    expert_LT: List[List[Array]] = [[] for _ in range(config.model.num_moe_layers)]
    for _, batch in validation_batches(
        prepared, sequences, sequences, config.data.reset_at_document_end
    ):
        arrays = (batch.tokens_BS, batch.positions_BS, batch.segments_BS, batch.domains_B)
        text_T = (batch.documents_BS >= 0).reshape(-1)
        x_TD, mask_BHSS, tokens_T, domains_T = model.embed(*map(Tensor, arrays), key, key, False)
        for index, block in enumerate(model.blocks):
            layer = index - model.num_dense
            if layer >= 0:
                _, normed_TD = block.attend(x_TD, mask_BHSS, key, key, False)
                plan = block.moe.router(
                    ops.cast(normed_TD, mstype.float32), tokens_T, domains_T, (key, key), False
                )
                x_LTD[layer].append(normed_TD.asnumpy()[text_T])
                best_T = plan["expert_A"].asnumpy().reshape(len(normed_TD), -1)[:, 0]
                expert_LT[layer].append(best_T[text_T])
            x_TD, _ = block(x_TD, mask_BHSS, tokens_T, domains_T, (key, key), DROPLESS, False)
    return [
        mean_cosines(np.concatenate(x), np.concatenate(expert))
        for x, expert in zip(x_LTD, expert_LT)
    ]
