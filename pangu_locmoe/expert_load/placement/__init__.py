"""Where experts and their copies go. NumPy only.

costs.py says what a placement costs; eplb.py balances by load alone; locality.py (starts.py,
search.py, exchange.py, problem.py) lowers the cost; spread.py parts copies; plan.py joins a placement with its figures,
reading.py reads it from a file, formats.py writes and reads the files of serving engines,
from_trace.py makes one from a recorded trace.
"""

from pangu_locmoe.expert_load.placement.costs import Costs, Evaluation, evaluate
from pangu_locmoe.expert_load.placement.eplb import rebalance
from pangu_locmoe.expert_load.placement.formats import (
    FORMATS,
    Placement,
    load_placement,
    save_placement,
)
from pangu_locmoe.expert_load.placement.from_trace import first_placement, place_trace
from pangu_locmoe.expert_load.placement.locality import place_by_locality
from pangu_locmoe.expert_load.placement.plan import (
    POLICIES,
    Figures,
    PlacementPlan,
    plan,
    save_plan,
)
from pangu_locmoe.expert_load.placement.reading import load_plan, read_plan

__all__ = [
    "FORMATS",
    "POLICIES",
    "Costs",
    "Evaluation",
    "Figures",
    "Placement",
    "PlacementPlan",
    "evaluate",
    "first_placement",
    "load_placement",
    "load_plan",
    "place_by_locality",
    "place_trace",
    "plan",
    "read_plan",
    "rebalance",
    "save_placement",
    "save_plan",
]
