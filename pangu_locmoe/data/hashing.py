"""Hashes of all windows of a row of numbers. N = numbers, W = N - size + 1 windows."""

from __future__ import annotations

import numpy as np

_FACTOR = 0x9E3779B97F4A7C15


def window_hashes(values_N: np.ndarray, size: int) -> np.ndarray:
    """uint64 [W], a hash of each `size` consecutive numbers of int or uint64 [N]; empty where N <
    size.

    A polynomial in an odd factor, modulo 2**64, put together from windows of 1, 2, 4, ... numbers.
    """
    count = len(values_N) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    power_W = _mix(values_N.astype(np.uint64) + np.uint64(1))  # windows of `span`
    span = 1
    done = 0
    hashes_W = np.zeros(count, np.uint64)
    while done < size:
        if size & span:
            hashes_W = hashes_W * _factor(span) + power_W[done : done + count]
            done += span
        if done < size:
            power_W = power_W[:-span] * _factor(span) + power_W[span:]
            span *= 2
    return _mix(hashes_W)


def _factor(power: int) -> np.uint64:
    return np.uint64(pow(_FACTOR, power, 2**64))


def _mix(hashes: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (MurmurHash3's finalizer)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(33))
