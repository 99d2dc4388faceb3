"""Seconds of a step of every router at every capacity factor, in turn in one process, so that
whatever slows the machine slows all.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.train.loop import Trainer
from study.experiment import Case, Measured
from study.training import configured

WARM_UP = 3  # rounds: the first compiles

Times = Dict[Tuple[str, float], List[float]]
"""seconds of each round by router and factor"""


def measure(case: Case) -> Any:
    """Every router of `routers` at every factor of `factors` makes one step a round, on the same
    text.
    """
    with tempfile.TemporaryDirectory() as folder:
        timed = {}
        for router in case["routers"]:
            for factor in case["factors"]:
                config = configured(
                    {**case, "router": router, "set": [f"moe.capacity.factor={factor}"]}
                )
                timed[router, factor] = Trainer(config, prepare(config, False), Path(folder))
        seconds: Times = {key: [] for key in timed}
        for step in range(1, WARM_UP + case["rounds"] + 1):
            for key, trainer in timed.items():
                batch = next(trainer.loader)
                started = time.perf_counter()
                trainer.stepper(batch, step, trainer.config.train.learning_rate)
                seconds[key].append(round(time.perf_counter() - started, 6))
    return [
        {"router": router, "factor": factor, "seconds": values[WARM_UP:]}
        for (router, factor), values in seconds.items()
    ]


def by_run(measured: Sequence[Measured]) -> List[Times]:
    """The times of each case that `measure` has measured."""
    return [
        {(row["router"], row["factor"]): row["seconds"] for row in one["result"]}
        for one in measured
    ]


def shorter(times: Times, this: Tuple[str, float], than: Tuple[str, float]) -> float:
    """By which share a step is shorter than another: the median over the rounds."""
    return 1 - statistics.median(ours / other for ours, other in zip(times[this], times[than]))
