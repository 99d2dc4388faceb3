"""The jobs that several tests look at; each starts once.

Starting processes is what takes time, so one does many things.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pangu_locmoe.cli import main
from pangu_locmoe.config import Config
from support import jobs, tiny

WORKER = Path(__file__).with_name("worker.py")
STEPS = 9
EVERY = 3
WATCHED = 8


def config(**parallel: Any) -> Config:
    """What the tests of checkpoints train."""
    return tiny.tiny_config(
        moe={"router": "locmoe", "locality_loss": 0.1, "capacity": {"factor": 1.0}},
        # Validation sides shorter than a sequence: what fills them up is text on no rank.
        data={"sharding": "domain", "max_bytes_per_domain": 20_000, "validation_fraction": 0.004},
        train={"steps": STEPS, "learning_rate": 5e-4, "epsilon": 1e-6, "mode": "pynative"},
        evaluation={"every": EVERY, "sequences": 2},
        checkpoint={"every": EVERY, "keep": 5},
        trace={"timeline": WATCHED} if "expert_parallel" in parallel else {},
        parallel=parallel,
    )


@functools.cache
def folder() -> Path:
    """Where the runs are: one (undisturbed, 1 process), four (4 ranks), one-after-four,
    two-after-one.
    """
    path = Path(tempfile.mkdtemp(prefix="runs-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def job(ranks: int, which: str = "everyday") -> tuple[Path, list[dict[str, Any]]]:
    """The folder of an invariance job and what every rank found; jobs of 4 and 2 ranks then
    train, see `train_on`.
    """
    path = folder() / f"{which}-{ranks}"
    path.mkdir()
    arguments: list[str] = []
    if which == "everyday" and ranks == 4:
        arguments = _arguments(
            "four", expert_parallel=2, tensor_parallel=2, exchange="groupwise", nodes=2
        )
    if which == "everyday" and ranks == 2:
        _one_after_four()
        _hand_over("one-after-four", "two-after-one", 2 * EVERY)
        arguments = _arguments("two-after-one", expert_parallel=2, nodes=2)
    # All cases take their time, and a rank that compiles on few cores is silent for longer than a
    # dead one should be waited for.
    timeout, env = (
        (900, None) if which == "everyday" else (3600, jobs.environment(MS_NODE_TIMEOUT="120"))
    )
    done = jobs.msrun(ranks, path, WORKER, path, which, *arguments, timeout=timeout, env=env)
    assert done.returncode == 0, jobs.logs(path)
    return path, [
        json.loads((path / f"rank-{rank}.json").read_text(encoding="utf-8"))
        for rank in range(ranks)
    ]


@functools.cache
def train_on() -> Path:
    """All four runs: 4 ranks, their first checkpoint in 1 process, and that one's second on 2
    ranks.
    """
    assert main(_arguments("one", nodes=2)) == 0
    job(2)
    return folder()


@functools.cache
def _one_after_four() -> None:
    job(4)
    _hand_over("four", "one-after-four", EVERY)
    assert main(_arguments("one-after-four", nodes=2)) == 0


def _arguments(name: str, **parallel: Any) -> list[str]:
    return [
        "train",
        str(tiny.write(config(**parallel), folder(), name)),
        "--run-dir",
        str(folder() / name),
        "--resume",
        "auto",
        "--no-progress",
    ]


def _hand_over(before: str, after: str, step: int) -> None:
    """A run directory that holds another one's checkpoint of a step, and its rows."""
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(folder() / before / name, folder() / after / name)
    for file in ("metrics.jsonl", "config.yaml"):
        shutil.copy(folder() / before / file, folder() / after)
