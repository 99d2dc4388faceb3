"""Compiles one rank's training step with MindSpore's Ascend back end and walks through it.

`python -m pangu_locmoe.check.dry_run.step REQUEST.json RESULT.json`, in the environment of
process.py. MindSpore's log, and its order of execution, say what became of the step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import mindspore as ms
from mindspore import Tensor
from mindspore.communication import create_group, init

from pangu_locmoe.check.compile import RankStep, without_values
from pangu_locmoe.config import Config, parse_config
from pangu_locmoe.parallel.hccl import HcclOperators


def walk_through(config: Config, num_ranks: int, rank: int) -> Dict[str, Any]:
    """The rank's weights and groups, the peak of the planned memory in bytes, and seconds."""
    started = time.time()
    ms.set_device("Ascend")
    init("hccl")
    without_values()
    communicator = HcclOperators(rank, num_ranks, create_group)
    step = RankStep.of(config, communicator)
    rate = Tensor(1e-3, ms.float32)
    number = Tensor(1, ms.int32)
    ms.jit(step.first)(*step.inputs)
    if step.parts.buffers is not None:
        reduce, apply, clear = map(ms.jit, step.parts.after())
        norm = reduce(rate)
        apply(rate, number, norm)
        clear(rate, number, norm)
    return {
        "weights": step.weights(),
        "groups": {name: list(ranks) for name, ranks in communicator.groups.items()},
        "peak_bytes": ms.runtime.max_memory_allocated(),
        "seconds": time.time() - started,
    }


def main(arguments: List[str]) -> int:
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    config = parse_config(request["config"])
    result = walk_through(config, request["ranks"], request["rank"])
    Path(arguments[1]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
