"""What to place, for what, and the value the search lowers.

Letters: L layers, N nodes, R ranks, E experts, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np

from pangu_locmoe.expert_load.placement.costs import (
    Bools,
    Costs,
    Evaluation,
    Floats,
    Ints,
    evaluate,
)

# Among placements whose slowest rank and busiest node are the same, evener ranks and fewer
# crossings are better: they lead
# out of the plateaus that a maximum has. The weight is small enough not to trade the maximum away.
TIE_WEIGHT = 1e-3


@dataclass(frozen=True)
class Problem:
    """What to place, and for what.

    Attributes:
        load_LNE: float, token rows of a step by source node and expert.
        held_LRE: bool, experts each rank holds now.
        num_ranks: R.
        costs: prices.
        allowed_LNE: bool, the nodes an expert may be in; None: all.
    """

    load_LNE: Floats
    held_LRE: Bools
    num_ranks: int
    costs: Costs
    allowed_LNE: Optional[Bools] = None

    def rows(self, row_L: Ints) -> Problem:
        """The same of some layers, in this order; a layer may occur several times."""
        allowed = None if self.allowed_LNE is None else self.allowed_LNE[row_L]
        return Problem(
            self.load_LNE[row_L], self.held_LRE[row_L], self.num_ranks, self.costs, allowed
        )

    def evaluate(self, expert_of_slot_LP: Ints) -> Evaluation:
        return evaluate(expert_of_slot_LP, self.load_LNE, self.num_ranks, self.costs, self.held_LRE)

    def value(self, expert_of_slot_LP: Ints) -> Floats:
        """Seconds of each layer plus the tie-break."""
        return value_of(self.evaluate(expert_of_slot_LP), self.costs)


def value_of(now: Evaluation, costs: Costs) -> Floats:
    total_L = np.maximum(now.load_LR.sum(axis=1), 1e-300)
    evenness_L = costs.token_seconds * np.square(now.load_LR).sum(
        axis=1
    ) / total_L + costs.row_seconds * now.out_LN.mean(axis=1)
    return now.seconds_L + TIE_WEIGHT * evenness_L
