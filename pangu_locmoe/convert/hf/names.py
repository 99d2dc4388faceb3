"""Names and forms of the weights: here w_in [D, F] for x @ w_in, there an nn.Linear, which is its
transpose; here gamma and beta, there an nn.LayerNorm's weight and bias.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

from pangu_locmoe.errors import CheckpointError

_PREFIX = "model."
_TRANSPOSED = ("w_query", "w_key_value", "w_in", "w_out")
_ENDS = (
    *((name, f"{name}.weight") for name in _TRANSPOSED),
    *((f"{name}_table", f"{name}_table.weight") for name in ("word", "position", "query")),
    *((f"{name}.gamma", f"{name}.weight") for name in ("norm1", "norm2", "final_norm")),
    *((f"{name}.beta", f"{name}.bias") for name in ("norm1", "norm2", "final_norm")),
    ("router.w_ED", "router.gate.weight"),
    *((f"router.{name}",) * 2 for name in ("bias", "table", "prior.table", "prior.beta")),
)
"""How a name ends here and there; before that they are alike."""


def name_there(name: str) -> str:
    """A checkpoint's name for a weight -> the PyTorch model's.

    Raises:
        CheckpointError: the PyTorch model has nothing like it.
    """
    for end_here, end_there in _ENDS:
        before = _before(name, end_here)
        if before is not None:
            return f"{_PREFIX}{before}{end_there}"
    raise CheckpointError(f"{name}: the PyTorch model has no such weight")


def name_here(name: str) -> str:
    """The inverse; a name may be without its prefix, as the model without its head writes them.

    Raises:
        CheckpointError: it is not of a pangu_locmoe model.
    """
    for end_here, end_there in _ENDS:
        before = _before(name, end_there)
        if before is not None:
            return before.removeprefix(_PREFIX) + end_here
    raise CheckpointError(f"{name}: no weight of a pangu_locmoe model")


def turned(name: str, array: np.ndarray) -> np.ndarray:
    """The array of the weight that a checkpoint calls `name` as the other side has it."""
    return np.ascontiguousarray(array.T) if name.endswith(_TRANSPOSED) else array


def _before(name: str, end: str) -> Optional[str]:
    """What is before the end, empty or with a dot; None where the name ends otherwise."""
    before = name.removesuffix(end)
    matches = name.endswith(end) and (not before or before.endswith("."))
    return before if matches else None
