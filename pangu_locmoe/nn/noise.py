"""Randomness that depends on the step, the layer and the place only, so that a resumed run draws
the same numbers.

MindSpore's random operators keep their state inside the kernel, where no checkpoint reaches it.
Here the host draws one 32-bit key per token and per feature from (seed, step); the graph mixes row
and column keys into a number for each place.

Letters: T tokens, D features.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np
from mindspore import Tensor, ops
from mindspore.common import dtype as mstype

Noise = Tuple[Tensor, Tensor]  # (row keys int32 [T], column keys int32 [D])

# The 32-bit mixers of MurmurHash3's finaliser, as signed numbers.
_MULTIPLIERS = (Tensor(-2048144789, mstype.int32), Tensor(-1028477387, mstype.int32))


def draw_keys(
    seed: int, step: int, num_tokens: int, num_features: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of one step: int32 [T] and int32 [D], the same for the same (seed, step)."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    keys = generator.integers(
        -(2**31), 2**31, size=num_tokens + num_features, dtype=np.int64
    ).astype(np.int32)
    return keys[:num_tokens], keys[num_tokens:]


def uniform(noise: Noise, site: int) -> Tensor:
    """Uniform numbers in [0, 1), fp32 [T, D].

    Args:
        noise: keys of this step.
        site: a number of its own for each place of the model that draws.
    """
    rows_T, columns_D = noise
    bits_TD = ops.bitwise_xor(
        ops.expand_dims(rows_T * (2 * site + 1), 1), ops.expand_dims(columns_D, 0)
    )
    for multiplier in _MULTIPLIERS:
        # The shift keeps the sign, which is as good a mixer as a logical one; products wrap around.
        bits_TD = ops.bitwise_xor(bits_TD, ops.bitwise_right_shift(bits_TD, 15)) * multiplier
    return ops.cast(
        ops.bitwise_and(ops.bitwise_right_shift(bits_TD, 8), 0xFFFFFF), mstype.float32
    ) * (1.0 / 2**24)


def dropout(x_TD: Tensor, rate: float, noise: Noise, site: int) -> Tensor:
    """Zero a fraction `rate` of the features and scale the rest by 1 / (1 - rate)."""
    keep_TD = ops.cast(ops.greater_equal(uniform(noise, site), rate), x_TD.dtype)
    return x_TD * keep_TD * (1.0 / (1.0 - rate))
