"""A whole run around the loop: the run directory, what is printed, the summary, the samples and
the report.
"""

from __future__ import annotations

import os
import platform
import time
from contextlib import ExitStack
from pathlib import Path
from signal import Signals
from typing import Any, Dict, Iterator, List, Optional, Sequence

import mindspore as ms

from pangu_locmoe import console
from pangu_locmoe.checkpoint.format import (
    find_checkpoint,
    latest_whole_checkpoint,
    read_config,
    read_identity,
)
from pangu_locmoe.config import Config, SampleConfig, doubtful_settings
from pangu_locmoe.config.stored import as_before, load_stored_config
from pangu_locmoe.data.prepared import Prepared, prepare
from pangu_locmoe.errors import CheckpointError, ConfigError, DataError
from pangu_locmoe.files import json_text, write_atomic
from pangu_locmoe.generate import Generator
from pangu_locmoe.model.size import num_active_params, num_params
from pangu_locmoe.moe.routers import router_class
from pangu_locmoe.nn.device import on_ascend
from pangu_locmoe.parallel.agreement import together
from pangu_locmoe.parallel.communicator import Communicator, SingleProcess
from pangu_locmoe.parallel.selfcheck import check_groups, check_same_run, check_same_step
from pangu_locmoe.parallel.world import World
from pangu_locmoe.report.page import build_report
from pangu_locmoe.report.wall_time import read_wall_time
from pangu_locmoe.train.claim import claimed
from pangu_locmoe.train.evaluate import format_evaluation, format_interval
from pangu_locmoe.train.loggers import WriteToService, make_loggers
from pangu_locmoe.train.loop import Trainer
from pangu_locmoe.train.wall_clock import WallClock

# What may differ between a run and its resumption: where things are computed and what is written,
# not what is learned.
_FREE_KEYS = (
    "parallel",
    "evaluation",
    "checkpoint",
    "trace",
    "placement",
    "logging",
    "sample",
    "train.fused",
    "train.offload_expert_optimizer",
    "train.log_every",
    "data.prepared_dir",
    "data.workers",
)
# Where the text and the tokenizer lie; whether they are the same is seen when they are prepared.
_PLACES = ("data.sources", "data.tokenizer")


@console.forgiving()
def train(
    config: Config,
    run_dir: Path,
    resume: bool = False,
    init_from: Optional[Path] = None,
    progress: bool = True,
    communicator: Optional[Communicator] = None,
) -> Optional[Signals]:
    """Train, evaluate, sample, report; everything goes to `run_dir`.

    In a job of several processes all call this; rank 0 writes.

    Returns:
        None, or the signal that stopped the run (its state is saved).

    Raises:
        LocMoEError: anything a user can act on.
    """
    communicator = communicator or SingleProcess()
    check_same_run(config, communicator)
    router_class(config)  # before anything starts
    check_device(config)
    with ExitStack() as held:
        loggers: List[WriteToService] = []
        with together(communicator, ConfigError):
            if communicator.rank == 0:
                loggers = make_loggers(config, run_dir)
                held.enter_context(claimed(run_dir))
            config = _check_run_dir(config, run_dir, resume)
            if init_from is not None:
                config, _ = as_before(config, read_config(find_checkpoint(init_from)), "model")
        return _train(config, run_dir, resume, init_from, progress, communicator, loggers)


def _train(
    config: Config,
    run_dir: Path,
    resume: bool,
    init_from: Optional[Path],
    progress: bool,
    communicator: Communicator,
    loggers: Sequence[WriteToService],
) -> Optional[Signals]:
    clock = WallClock()
    started = time.perf_counter()
    world = World.of(config, communicator)
    check_groups(world.topology, communicator)
    say = print if world.is_first else _say_nothing
    prepared = _prepare(config, progress, world)
    for note in doubtful_settings(config, communicator.size):
        say(f"note: {note}")
    say(prepared.summary())
    trainer = Trainer(config, prepared, run_dir, init_from, world, loggers, clock)
    resumed = resume and trainer.resume()
    check_same_step(trainer.step, communicator)
    with together(communicator):
        if world.is_first:  # only now: a run that cannot begin leaves no directory behind
            for logger in loggers:
                logger.begin(run_dir, resumed)
            _write(run_dir / "config.yaml", config.to_yaml())
            _write(run_dir / "data.json", json_text(prepared.identity, indent=1, ascii_only=False))
    if resumed:
        say(f"resuming after step {trainer.step}")
    elif resume:
        say(f"nothing to resume: {run_dir} has no checkpoint; starting at step 0")
    for note in trainer.notes:
        say(f"note: {note}")
    say(
        f"{num_params(config):,} parameters, {num_active_params(config):,} active for one "
        f"token; {config.moe.router} router; run directory {run_dir}"
    )
    stopped_by = trainer.run(progress)
    if stopped_by is not None:
        say(
            f"stopped by {stopped_by.name} after step {trainer.step}, state saved; "
            f"continue with --resume auto --run-dir {run_dir}"
        )
        # msrun kills the others when the first one ends with such an exit code
        communicator.barrier()
        return stopped_by
    summary = _summarise(trainer, time.perf_counter() - started)
    if not world.is_first:
        return None
    _write(run_dir / "summary.json", json_text(summary, indent=1, ascii_only=False))
    report = build_report([run_dir], run_dir / "report.html")
    _print_summary(summary)
    print(f"run directory: {run_dir}\nreport: {report}")
    return None


def _prepare(config: Config, progress: bool, world: World) -> Prepared:
    """Rank 0 prepares, then the others find it prepared."""
    found: Optional[Prepared] = None
    with together(world.communicator, DataError):
        if world.is_first:
            found = prepare(config, progress)
    with together(world.communicator, DataError):
        return found or prepare(config, progress)


def _say_nothing(text: str) -> None:
    """What ranks other than 0 print."""


def check_device(config: Config) -> None:
    """Raises ConfigError for what the device cannot do."""
    device = ms.get_context("device_target")
    if device == "CPU" and config.train.precision == "bf16":
        raise ConfigError(
            "train.precision = 'bf16': MindSpore's CPU backend has no bf16 kernels; use "
            "fp32 (or fp16, slower)"
        )
    if config.train.fused and not on_ascend():
        raise ConfigError(
            "train.fused = True: the fused operators are Ascend's, and this is a "
            f"{device}; must be false"
        )


def _check_run_dir(config: Config, run_dir: Path, resume: bool) -> Config:
    """The configuration to go on with: of a run of an older version, with what that one did
    where the user's file does not say.
    """
    file = run_dir / "config.yaml"
    if file.exists() and not resume:
        raise ConfigError(
            f"--run-dir {run_dir}: holds a run already; give another directory, or "
            "--resume auto to continue it"
        )
    if file.exists():
        before = _config_of_run(file)
        config, _ = as_before(config, before)
        folder = latest_whole_checkpoint(run_dir)
        compared = folder is not None and read_identity(folder) is not None
        # The tokenizer is compared in any case; older versions did not keep what the text was.
        free = (*_FREE_KEYS, *(_PLACES if compared else _PLACES[1:]))
        _check_same_run(before, config, run_dir, free)
    return config


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text.encode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written: {error.strerror}") from None


def _config_of_run(file: Path) -> Config:
    """What a run was started with; a key that this version added has what the run did
    (config/stored.py).
    """
    try:
        return load_stored_config(file)
    except ConfigError as error:
        raise ConfigError(
            f"the run was started with another version of pangu_locmoe: {error}"
        ) from None


def _check_same_run(before: Config, config: Config, run_dir: Path, free: Sequence[str]) -> None:
    for key, old, new in _differences(
        before.model_dump(mode="json"), config.model_dump(mode="json"), ""
    ):
        if not any(key == one or key.startswith(f"{one}.") for one in free):
            raise ConfigError(
                f"{key} = {new!r}: the run in {run_dir} has {old!r}; a run can only be "
                "resumed with what it was started with"
            )


def _differences(before: Any, now: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(
                before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key
            )
    elif before != now:
        yield prefix, before, now


def _summarise(trainer: Trainer, seconds: float) -> Dict[str, Any]:
    config = trainer.config
    prepared = trainer.prepared
    spent = read_wall_time(trainer.run_dir)
    return {
        "parameters": num_params(config),
        "active_parameters": num_active_params(config),
        "bigram_bits_per_byte": prepared.bigram_bits_per_byte,
        "final": trainer.final,
        "final_blocks": trainer.evaluator.blocks,
        "best": trainer.best,
        "samples": _samples(trainer, config.sample),
        "corpus": prepared.report.to_dict(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "mindspore": ms.__version__,
            "device": ms.get_context("device_target"),
        },
        "wall_seconds": seconds,
        "wall_time": spent.to_dict() if spent is not None else None,
    }


def _samples(trainer: Trainer, sample: SampleConfig) -> List[Dict[str, str]]:
    """A continuation of the beginning of one validation text of each domain."""
    if sample.tokens == 0:
        return []
    prepared = trainer.prepared
    prompts = [_prompt(prepared, domain) for domain in range(len(prepared.domains))]
    generator = Generator(
        trainer.model, trainer.config, prepared.tokenizer, compiled=trainer.world.exchange is None
    )
    texts = generator(prompts, range(len(prompts)), sample, trainer.config.train.seed)
    return [
        {"domain": domain, "prompt": prompt, "text": text}
        for domain, prompt, text in zip(prepared.domains, prompts, texts)
    ]


def _prompt(prepared: Prepared, domain: int) -> str:
    tokens = [
        token
        for token in prepared.sequences("validation", domain, [0])[0].tolist()
        if token != prepared.tokenizer.end_of_document
    ]
    text = prepared.tokenizer.decode(tokens[:16]).strip("\ufffd")
    return text


def _print_summary(summary: Dict[str, Any]) -> None:
    for sample in summary["samples"]:
        print(f"\n--- {sample['domain']} ---\n{sample['prompt']}|{sample['text']}")
    print("\n" + format_evaluation(summary["final"], summary["bigram_bits_per_byte"]))
    print(format_interval(summary["final"]))
