"""A corpus of three generated domains, a configuration small enough to train in a test, and
short runs of it.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, Optional

import numpy as np

from pangu_locmoe.config import Config, parse_config
from pangu_locmoe.data.loader import Batch, BatchLoader
from pangu_locmoe.data.prepared import Prepared, prepare
from pangu_locmoe.data.sampler import BatchSampler
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.train.run import train
from pangu_locmoe.train.step import LocalStepper, StepResult

DOMAINS = ("en", "zh", "code")
# Few words that always follow each other in one of a few ways, so that 30 steps are enough to learn
# something.
PHRASES = {
    "en": [
        "the router sends every token ",
        "to the expert of its domain ",
        "and the expert sends it back. ",
    ],
    "zh": ["路由把每个词元送到", "本领域的专家那里，", "专家再把它送回来。"],
    "code": ["for token in tokens:\n", "    expert = route(token)\n", "    expert.append(token)\n"],
}
# What differs between two runs of the same thing.
TIMING = ("tokens_per_second", "step_seconds")


@functools.cache
def corpus() -> Path:
    """A folder with one folder of text files for each domain."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-corpus-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for domain in DOMAINS:
        (folder / domain).mkdir()
        for number in range(24):
            choice = random.Random(f"{domain}{number}")
            text = f"{number} " + "".join(choice.choice(PHRASES[domain]) for _ in range(40))
            (folder / domain / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def sources() -> list[dict[str, str]]:
    return [{"path": str(corpus() / domain), "domain": domain} for domain in DOMAINS]


def prepared_dir() -> str:
    return str(corpus() / "prepared")


def tiny_config(**sections: dict[str, Any]) -> Config:
    """3 layers of which 1 is sparse, hidden size 32, 4 experts, sequences of 32 tokens;
    `sections` win.
    """
    base: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": 400,
            "hidden_size": 32,
            "num_layers": 3,
            "num_moe_layers": 1,
            "num_heads": 2,
            "ffn_size": 64,
            "seq_length": 32,
        },
        "moe": {"router": "locmoe", "num_experts": 4, "levels": 1},
        "data": {"sources": sources(), "prepared_dir": prepared_dir(), "validation_fraction": 0.2},
        "train": {"steps": 12, "batch_size": 8, "warmup_steps": 2, "learning_rate": 0.01},
        "evaluation": {"every": 6, "sequences": 4},
        "checkpoint": {"every": 4},
        "sample": {"tokens": 0},
    }
    return parse_config(
        {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    )


def write(config: Config, folder: Path, name: str = "config") -> Path:
    """The configuration as a file for the command line."""
    file = folder / f"{name}.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    return file


def reference_config() -> Config:
    """The run that the tests of the loop and of resuming share: dropout, two nodes, and a
    capacity measured on the way.
    """
    return tiny_config(
        model={"dropout": 0.1},
        moe={
            "locality_loss": 0.1,
            "capacity": {"policy": "bound", "warmup_steps": 7, "statistic": 0.25, "max_drop": 0.2},
        },
        parallel={"nodes": 2},
        data={"sharding": "domain"},
        train={"steps": 40, "learning_rate": 0.003},
        evaluation={"every": 10, "sequences": 4},
        checkpoint={"every": 5, "keep": 2},
    )


@functools.cache
def reference_run() -> Path:
    """The run directory of `reference_config`, trained without disturbance."""
    run_dir = corpus() / "reference"
    assert train(reference_config(), run_dir, progress=False) is None
    return run_dir


def batches(config: Config, prepared: Prepared) -> Iterator[Batch]:
    """The run's training batches."""
    sampler = BatchSampler(
        prepared.num_sequences["train"],
        config.train.batch_size,
        seed=config.train.seed,
        nodes=config.parallel.nodes,
    )
    return BatchLoader(prepared, sampler, config.data.reset_at_document_end)


def make_stepper(config: Config) -> LocalStepper:
    """A fresh model and its optimizer."""
    return LocalStepper(PanguSigma(config, prepare(config, False).token_counts), config)


def steps(config: Config, count: int) -> list[StepResult]:
    """The first steps of a run at the constant learning rate, without evaluation and files."""
    stepper = make_stepper(config)
    source = batches(config, prepare(config, False))
    return [
        stepper(next(source), number, config.train.learning_rate) for number in range(1, count + 1)
    ]


def losses(results: list[StepResult]) -> np.ndarray:
    """Every loss and the gradient norm of each step, float64 [steps, 6]."""
    return np.array([[*result.losses.values(), result.grad_norm] for result in results])


def rows(run_dir: Path, timing: bool = False) -> list[dict[str, Any]]:
    """The rows of a run's metrics, without the fields that differ between two runs of the same
    thing.
    """
    found = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return (
        found
        if timing
        else [{key: value for key, value in row.items() if key not in TIMING} for row in found]
    )


def trace(run_dir: Path) -> dict[str, np.ndarray]:
    """The arrays of a run's load.npz."""
    with np.load(run_dir / "load.npz") as archive:
        return dict(archive)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pangu_locmoe", *map(str, arguments)]


def cli(
    *arguments: object, folder: Optional[Path] = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a verb in a process of its own."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=timeout,
    )


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
