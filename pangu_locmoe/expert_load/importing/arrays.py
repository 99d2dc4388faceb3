"""Counts that come as whole arrays: checked, brought from slots to experts, and made a trace.

Letters: W rows, L layers, N nodes, E experts, P expert slots, X any leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.importing.limits import LARGEST_INDEX, LARGEST_TRACE
from pangu_locmoe.expert_load.trace import Trace, whole_counts

Ints = NDArray[np.int64]


def array_of(name: str, value: Any, axes: Sequence[str]) -> NDArray[Any]:
    """A list or an array as an array with these axes, none of them empty. Raises DataError."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists of unequal lengths
        array = np.empty(0)
    if array.ndim != len(axes) or array.dtype.kind not in "iuf":
        raise DataError(f"{name} must be numbers [{', '.join(axes)}], is {_told(value, array)}")
    if 0 in array.shape:
        raise DataError(f"{name} is empty: it has shape {list(array.shape)}")
    return array


def counts_of(name: str, value: Any, axes: Sequence[str]) -> Ints:
    """The same, of whole numbers that are not negative."""
    return whole_counts(name, array_of(name, value, axes)).astype(np.int64, copy=False)


def index_of(name: str, value: Any, least: int, largest: int) -> int:
    """`type` and not isinstance: True is no integer here. Raises DataError."""
    if type(value) is not int or not least <= value <= largest:
        told = "absent" if value is None else repr(value)[:40]
        raise DataError(f"{name} must be an integer from {least} to {largest}, is {told}")
    return value


def map_of(name: str, value: Any, shape: tuple[int, ...], num_experts: int | None) -> Ints:
    """The expert in each slot, int64 [L, P]; -1: an empty slot.

    Args:
        shape: (L, P) of the counts.
        num_experts: that there may be; None: any.

    Raises DataError.
    """
    map_LP = array_of(name, value, ("layers", "slots"))
    if map_LP.shape != shape:
        raise DataError(
            f"{name} has {map_LP.shape[0]} layers and {map_LP.shape[1]} slots, "
            f"the counts have {shape[0]} and {shape[1]}"
        )
    top = LARGEST_INDEX if num_experts is None else num_experts - 1
    whole = map_LP.dtype.kind in "iu" or bool((map_LP == np.floor(map_LP)).all())
    if not whole or map_LP.min() < -1 or map_LP.max() > top:
        raise DataError(f"{name} must be experts 0 to {top}, or -1 for an empty slot")
    if map_LP.max() < 0:
        raise DataError(f"{name} has no experts")
    return map_LP.astype(np.int64)


def by_expert(count_XLP: Ints, map_LP: Ints, num_experts: int) -> Ints:
    """Counts by slot summed over each expert's slots, int64 [X, L, E].

    Raises DataError: an empty slot has tokens.
    """
    sum_XLE = np.zeros((*count_XLP.shape[:-1], num_experts), np.int64)
    for layer, map_P in enumerate(map_LP):
        count_XP = count_XLP[..., layer, :]
        if count_XP[..., map_P < 0].any():
            raise DataError(f"layer {layer} has tokens in a slot that holds no expert")
        order_P = np.argsort(map_P, kind="stable")[(map_P < 0).sum() :]
        expert_E, first_E = np.unique(map_P[order_P], return_index=True)
        sum_XLE[..., layer, expert_E] = np.add.reduceat(count_XP[..., order_P], first_E, axis=-1)
    return sum_XLE


def number_of_experts(told: int | None, found: int, where: str) -> int:
    """What the user says, or what the file has. Raises DataError if the file has more."""
    if told is not None and found > told:
        raise DataError(f"{where} has {found} experts, num_experts says {told}")
    return found if told is None else told


def padded(load_WLE: Ints, told: int | None) -> Ints:
    """With as many experts as the user says. Raises DataError if there are more already."""
    experts = load_WLE.shape[2]
    num_experts = number_of_experts(told, experts, "the file")
    check_size(*load_WLE.shape[:2], num_experts)
    return np.pad(load_WLE, ((0, 0), (0, 0), (0, num_experts - experts)))


def trace_of(step_W: Sequence[int], count_WLNE: Ints, sourced: bool) -> Trace:
    """A trace of counts by node; rows in rising order of their steps. Raises DataError."""
    order_W = np.argsort(step_W, kind="stable")
    count_WLNE = count_WLNE[order_W]
    load_WLE = whole_counts("load", count_WLNE.sum(axis=2))
    kind = np.int32 if load_WLE.max() < 2**31 else np.int64
    source_WLNE = count_WLNE.astype(kind) if sourced else None
    return Trace(
        np.asarray(step_W, np.int64)[order_W], load_WLE.astype(kind), source_WLNE=source_WLNE
    )


def check_size(*shape: int) -> None:
    """Raises DataError if there would be more counts than a trace takes."""
    if int(np.prod(shape, dtype=object)) > LARGEST_TRACE:
        raise DataError(f"{list(shape)} are more than {LARGEST_TRACE} counts")


def _told(value: Any, array: NDArray[Any]) -> str:
    if isinstance(value, (list, tuple)) and array.size == 0:
        return "lists of unequal lengths" if len(value) else "empty"
    if isinstance(value, (list, tuple, np.ndarray)):
        return f"{array.dtype} {list(array.shape)}"
    return "absent" if value is None else type(value).__name__
