"""`check`'s estimate of a rank's memory against what MindSpore's Ascend back end plans for it in a
dry run: a table, of which docs/ascend.md has a part.

    .venv/bin/python scripts/ascend_memory.py           all jobs, a minute or two for each
    .venv/bin/python scripts/ascend_memory.py bf16 fp16

Needs what `pangu-locmoe check --simulate` needs, and no device. Exit code 1 where a job does not
compile, or the estimate is below the plan or more than 15% above it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

from pangu_locmoe.check.check import shallower
from pangu_locmoe.check.dry_run.libraries import DEFAULT_CHIP, ready
from pangu_locmoe.check.dry_run.run import comparable, dry_run
from pangu_locmoe.cli.clusters import cache_folder
from pangu_locmoe.config import Config, load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "ascend"
MOST = 1.15
"""of the plan that an estimate may be"""


@dataclass(frozen=True)
class Job:
    """A shipped configuration, and what is changed in it; rank 0 of some ranks."""

    changed: Tuple[str, ...] = ()
    file: str = "small.yaml"
    ranks: int = 8

    @classmethod
    def of_small(cls, *changed: str) -> Job:
        """small.yaml in bf16, with two dense and two sparse blocks."""
        return cls((*_SHALLOW, "train.precision=bf16", *changed))

    def config(self) -> Config:
        """With as many layers as `check` compiles."""
        return shallower(load_config(CONFIGS / self.file, list(self.changed)))


_SHALLOW = ("model.num_layers=5", "model.num_moe_layers=2")
_TENSOR = ("parallel.tensor_parallel=2", "parallel.expert_parallel=4")
JOBS: Dict[str, Job] = {
    "bf16": Job.of_small(),
    "fp32": Job.of_small("train.precision=fp32"),
    "fp16": Job.of_small("train.precision=fp16"),
    "fused": Job.of_small("train.fused=true"),
    "recompute": Job.of_small("train.recompute=true"),
    "fused, recompute": Job.of_small("train.fused=true", "train.recompute=true"),
    "accumulation": Job.of_small("train.accumulation_steps=2"),
    "switch": Job.of_small("moe.router=switch"),
    "hash": Job.of_small("moe.router=hash"),
    "locmoe_plus": Job.of_small("moe.router=locmoe_plus"),
    "chunks": Job.of_small("parallel.overlap_chunks=2"),
    "sharded": Job.of_small("parallel.shard_optimizer=true"),
    "offload": Job.of_small("train.offload_expert_optimizer=true"),
    "groupwise": Job.of_small(*_TENSOR, "parallel.exchange=groupwise"),
    "sequence": Job.of_small(*_TENSOR, "parallel.sequence_parallel=true"),
    "small": Job(),
    "paper_38b_64": Job(file="paper_38b_64.yaml", ranks=64),
    "paper_38b": Job(file="paper_38b.yaml", ranks=128),
    "paper_38b_910a": Job(file="paper_38b_910a.yaml", ranks=128),
    "paper_38b_256": Job(file="paper_38b_256.yaml", ranks=256),
    "pangu_sigma": Job(file="pangu_sigma.yaml", ranks=1024),
}


def main(names: List[str]) -> int:
    libraries = ready(cache_folder())
    print("| job | ranks | estimated, GB | planned, GB | estimated / planned |")
    print("|---|---|---|---|---|")
    good = True
    for name in names or JOBS:
        job = JOBS[name]
        run = dry_run(job.config(), job.ranks, [0], libraries, DEFAULT_CHIP)
        if run.problems:
            print(f"| {name} | {job.ranks} | {'; '.join(run.problems)} | | |", flush=True)
            good = False
            continue
        estimated = comparable(run.estimates[0])
        planned = run.runs[0].peak_bytes
        ratio = estimated / planned
        good = good and 1 <= ratio <= MOST
        print(
            f"| {name} | {job.ranks} | {estimated / 1e9:.3f} | {planned / 1e9:.3f} | {ratio:.2f} |",
            flush=True,
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
