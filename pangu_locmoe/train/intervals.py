"""How far a validation loss would move with other documents of the same kind: a 95% interval from
blocks of documents.

Tokens of one document are alike, so it is documents that count, not tokens. Neighbouring documents,
which are often alike too, form blocks. A domain's loss is a ratio, nats over tokens, whose variance
is that of its blocks' residuals (the linearised ratio estimator); domains are independent, and
Student's t has Satterthwaite's degrees of freedom.

Letters: I blocks, B documents.
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Blocks = Dict[str, Dict[str, Any]]
"""domain -> `weight`, its part of the figure for all text, and `sums`, [nats, tokens] of each
block.
"""

MOST_BLOCKS = 32
LEVEL = 0.95


def in_blocks(sums_B2: Floats) -> list[list[float]]:
    """[nats, tokens] of documents in their order -> of blocks of them.

    Documents without tokens count for nothing.
    """
    kept_B2 = sums_B2[sums_B2[:, 1] > 0]
    parts = np.array_split(kept_B2, min(len(kept_B2), MOST_BLOCKS) or 1)
    return [
        [round(float(nats), 4), int(tokens)]
        for nats, tokens in (part.sum(axis=0) for part in parts)
    ]


def interval(blocks: Blocks) -> Optional[Tuple[float, float]]:
    """Ends of the interval of the loss over all text; None where a domain has fewer than two
    blocks.
    """
    total = sum(domain["weight"] for domain in blocks.values())
    mean = 0.0
    variances = []
    freedoms = []
    for domain in blocks.values():
        nats_I, tokens_I = np.asarray(domain["sums"], float).T
        count = len(nats_I)
        part = domain["weight"] / total
        if count < 2:
            return None
        ratio = nats_I.sum() / tokens_I.sum()
        residual_I = (nats_I - ratio * tokens_I) / tokens_I.sum()
        mean += part * ratio
        variances.append(part**2 * count / (count - 1) * float(np.square(residual_I).sum()))
        freedoms.append(count - 1)
    variance = sum(variances)
    if variance == 0.0:
        return mean, mean
    freedom = variance**2 / sum(each**2 / degrees for each, degrees in zip(variances, freedoms))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * variance**0.5
    return mean - half, mean + half


def difference(first: Blocks, second: Blocks) -> Blocks:
    """Blocks of the first loss less the second's, whose interval tells whether two models differ on
    other documents too.

    Raises ValueError if they were not measured on the same text.
    """
    found: Blocks = {}
    for name, one in first.items():
        own, other = (np.asarray(blocks["sums"], float) for blocks in (one, second.get(name, one)))
        if (
            list(first) != list(second)
            or own.shape != other.shape
            or (own[:, 1] != other[:, 1]).any()
        ):
            raise ValueError(f"the losses in domain {name} are of different text")
        found[name] = {
            "weight": one["weight"],
            "sums": np.stack([own[:, 0] - other[:, 0], own[:, 1]], axis=1).tolist(),
        }
    return found


def mean_of(runs: list[Blocks]) -> Blocks:
    """The blocks of a mean over runs, over seeds for example.

    Raises ValueError if they are of different text.
    """
    first = runs[0]
    for run in runs[1:]:
        difference(first, run)
    return {
        name: {**domain, "sums": np.mean([run[name]["sums"] for run in runs], axis=0).tolist()}
        for name, domain in first.items()
    }
