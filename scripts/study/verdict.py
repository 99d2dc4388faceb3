"""The rules by which numbers become verdicts. Each returns the verdict and the rule in words.

Values are one for each seed (or trace, or size), turned so that larger is what the paper claims.
"""

from __future__ import annotations

import statistics
from typing import Sequence, Tuple

HOLDS = "holds"
PARTLY = "holds partly"
NOT = "does not hold here"
CANNOT = "cannot be tested here"

Verdict = Tuple[str, str]


def at_least(values: Sequence[float], target: float, form: str = ".2%") -> Verdict:
    """Reaches the paper's figure, or at least its direction in every case."""
    rule = f"holds if the mean is at least {target:{form}}, partly if every value is above 0"
    if not values:
        return CANNOT, rule
    if statistics.mean(values) >= target:
        return HOLDS, rule
    return PARTLY if min(values) > 0 else NOT, rule


def at_most(values: Sequence[float], limit: float, partly: float, form: str = ".0%") -> Verdict:
    """Every value within a limit, or their mean within a wider one."""
    rule = (
        f"holds if every value is at most {limit:{form}}, partly if the mean is at most "
        f"{partly:{form}}"
    )
    if not values:
        return CANNOT, rule
    if max(values) <= limit:
        return HOLDS, rule
    return PARTLY if statistics.mean(values) <= partly else NOT, rule


def positive(values: Sequence[float], what: str) -> Verdict:
    """A direction, with no figure to reach."""
    rule = f"holds if {what} in every case, partly if in more than half of them"
    if not values:
        return CANNOT, rule
    share = sum(value > 0 for value in values) / len(values)
    return (HOLDS if share == 1 else PARTLY if share > 0.5 else NOT), rule


def all_of(parts: Sequence[bool], what: str) -> Verdict:
    """Several conditions together."""
    rule = f"holds if {what}; partly if some of that"
    if not parts:
        return CANNOT, rule
    return (HOLDS if all(parts) else PARTLY if any(parts) else NOT), rule


def cannot(why: str) -> Verdict:
    """Nothing here can say."""
    return CANNOT, why


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean, and the lowest and the highest where there are several."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"


def count(number: int, name: str) -> str:
    """1 seed, 3 seeds."""
    return f"{number} {name}{'s' * (number != 1)}"
