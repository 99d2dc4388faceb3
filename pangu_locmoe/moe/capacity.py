"""How many tokens an expert takes: LocMoE's and LocMoE+'s lower bounds and the policies.

NumPy and SciPy only.

Letters: n experts, d hidden size; E experts, X parts of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from pangu_locmoe.config import CapacityConfig

DROPLESS = 0  # the capacity that stands for "as many as come"
RATIO = 1.25  # between the sizes of a dynamic capacity


@dataclass(frozen=True)
class CapacityBounds:
    """LocMoE's lower bound on the capacity in its three forms, in tokens; infinity where a double
    cannot hold it.

    cosine: delta, the cosine from which on a token belongs to an expert.
    probability: p_delta, that a token uniform on the unit sphere has a cosine of delta or more, or
        of -delta or less, with one expert's gate (Lemma 3). It is two-sided; a token belongs to an
        expert on one side only, with half of it.
    exact, erfc, exponential: the theorem's lower bound, its form for large d, and a weaker one than
    that.
    """

    cosine: float
    probability: float
    exact: float
    erfc: float
    exponential: float


def capacity_bounds(hidden_size: int, num_experts: int, cosine: float) -> CapacityBounds:
    """LocMoE's theorem: ec_min >= 1 / (n p_delta), with p_delta = 1 - I_{delta^2}(1/2, (d-1)/2).

    As published: p_delta is the probability of |cos| >= delta, while routing asks for cos >= delta,
    which is half as probable. With that half every form would be twice as large.

    For large d, p_delta is close to erfc(sqrt(x)), and that is below exp(-x), with x = delta^2 d /
    (2 - delta^2). With delta <= 0 every token belongs to the expert and all forms are 1/n.

    Args:
        hidden_size: d, at least 1.
        num_experts: n, at least 1.
        cosine: delta, between -1 and 1.

    Raises:
        ValueError: an argument outside its range.
    """
    if hidden_size < 1 or num_experts < 1:
        raise ValueError(
            f"hidden_size ({hidden_size}) and num_experts ({num_experts}) must be at least 1"
        )
    if not -1.0 <= cosine <= 1.0:
        raise ValueError(f"cosine ({cosine}) must be between -1 and 1")
    squared = max(cosine, 0.0) ** 2
    # On the line (d = 1) every cosine is 1 or -1.
    probability = (
        float(special.betaincc(0.5, (hidden_size - 1) / 2, squared)) if hidden_size > 1 else 1.0
    )
    exponent = squared * hidden_size / (2 - squared)
    with np.errstate(over="ignore", divide="ignore"):
        return CapacityBounds(
            cosine=cosine,
            probability=probability,
            exact=float(np.divide(1.0, num_experts * probability)),
            erfc=float(np.divide(1.0, num_experts * special.erfc(math.sqrt(exponent)))),
            exponential=float(np.exp(exponent) / num_experts),
        )


def factor_capacity(factor: float, num_tokens: float, num_experts: int) -> int:
    """ceil(factor * tokens / experts), at least 1."""
    # 1.1 * 200 / 20 is 11.000000000000002 in floating point, and 12 slots would be one too many.
    return max(1, math.ceil(factor * num_tokens / num_experts - 1e-9))


def drop_floor(load_XE: np.ndarray, num_tokens: int, max_drop: float) -> int:
    """The smallest capacity with which experts take (1 - max_drop) * num_tokens assignments of a
    measured load, at least 1.

    The theorem's bound holds for any capacity that is enough, and is itself most often far from
    enough.

    Args:
        load_XE: assignments to each expert in each part of the step whose tokens share slots.
        num_tokens: of all parts together. A token of most routers is one assignment; of several the
            experts may refuse some.
        max_drop: the fraction that may be dropped.
    """
    needed = (1 - max_drop - 1e-9) * num_tokens
    low = 1
    high = max(1, math.ceil(load_XE.max(initial=0)))
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if np.minimum(load_XE, middle).sum() >= needed else (middle + 1, high)
        )
    return low


def bound_capacity(bounds: CapacityBounds, upper: int, floor: int = 1) -> int:
    """The exact bound, rounded up and clamped to [floor, upper]; where these cross, upper."""
    return upper if bounds.exact >= upper else min(upper, max(floor, math.ceil(bounds.exact)))


def dynamic_capacity(
    bounds: CapacityBounds, upper: int, now: int, hysteresis: float, floor: int = 1
) -> int:
    """LocMoE+'s C_min = exp(d delta^2 / (2 - delta^2)) / n, rounded up to one of a few sizes and
    clamped to [floor, upper].

    Sizes are upper / 1.25^k, rounded up, so that a run needs few compiled shapes and comes back to
    those it has.

    Args:
        bounds: with delta_max, as published, or with another statistic of the cosines.
        upper: the largest capacity.
        now: the capacity there is, which stays unless the bound is off by more than `hysteresis` of
            it, or it is below the floor.
        floor: of `drop_floor`; where it is above `upper`, upper.
    """
    floor = min(floor, upper)
    wanted = min(max(bounds.exponential, float(floor)), float(upper))
    if abs(wanted - now) <= hysteresis * now and now >= floor:
        return now
    exponent = math.floor(math.log(upper / wanted) / math.log(RATIO) + 1e-9)
    return min(
        size
        for size in (math.ceil(upper / RATIO**k - 1e-9) for k in (exponent, exponent + 1))
        if size >= wanted
    )


def transition_capacity(step: int, steps: int, num_tokens: int, final: int) -> int:
    """Capacity after `step` of the `steps` in which it shrinks by halves from all tokens to
    `final`, at even intervals.

    All tokens are DROPLESS: packed, they take far fewer slots than a capacity that holds them all
    would give every expert.
    """
    if step >= steps or final >= num_tokens:
        return final
    halved = step * math.ceil(math.log2(num_tokens / final)) // steps
    return max(final, math.ceil(num_tokens / 2**halved)) if halved else DROPLESS


def cosine_statistic(cosines: np.ndarray, statistic: str | float) -> float:
    """delta from the cosines between tokens and the gates of their experts: min, median, mean,
    max or a quantile.
    """
    if statistic == "mean":
        return float(np.mean(cosines))
    quantile = (
        {"min": 0.0, "median": 0.5, "max": 1.0}[statistic]
        if isinstance(statistic, str)
        else statistic
    )
    return float(np.quantile(cosines, quantile))


def initial_capacity(
    config: CapacityConfig, num_tokens: int, num_experts: int, choices: int = 1
) -> int:
    """Capacity at the start of a run: DROPLESS, or the factor's, which `bound` and `dynamic` too
    use until they have measured. A token is due `choices` experts.
    """
    if config.policy == "dropless":
        return DROPLESS
    return min(num_tokens, factor_capacity(config.factor * choices, num_tokens, num_experts))
