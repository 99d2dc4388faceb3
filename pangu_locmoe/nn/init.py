"""Initial weights from NumPy's counter-based generators: the same on every device and for every
number of ranks.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np


def normal(seed: Sequence[int], shape: tuple[int, ...], std: float) -> np.ndarray:
    """Normally distributed fp32 weights of a generator of their own, so that one part's size
    does not change another's.
    """
    return np.random.default_rng(list(seed)).standard_normal(shape, dtype=np.float32) * np.float32(
        std
    )
