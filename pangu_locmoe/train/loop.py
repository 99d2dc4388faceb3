"""The training loop: read a batch, make a step, tell the callbacks, evaluate, save.

Resumes where a checkpoint left off.
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence, Set

import mindspore as ms
import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from pangu_locmoe.checkpoint.format import (
    WEIGHTS,
    check_data,
    check_tokenizer,
    damage,
    find_checkpoint,
    latest_whole_checkpoint,
    load_optimizer,
    load_weights,
    passed_over,
    read_state,
    recover,
    remove_old,
    save_checkpoint,
    step_folders,
)
from pangu_locmoe.checkpoint.shards import Held
from pangu_locmoe.config import Config
from pangu_locmoe.data.contents import nodes_by_content
from pangu_locmoe.data.loader import BatchLoader
from pangu_locmoe.data.prepared import Prepared
from pangu_locmoe.data.sampler import BatchSampler
from pangu_locmoe.errors import CheckpointError, DivergenceError
from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.interrupts import stopping_signals
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.parallel.agreement import first_failure, together
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.parallel.world import World
from pangu_locmoe.report.wall_time import FINISHED, STOPPED, TIME_FILE
from pangu_locmoe.train import callbacks as jobs
from pangu_locmoe.train.evaluate import Evaluator
from pangu_locmoe.train.metrics import training_row
from pangu_locmoe.train.policies import make_policies
from pangu_locmoe.train.profiling import profiled
from pangu_locmoe.train.schedule import learning_rate
from pangu_locmoe.train.step import StepResult, make_stepper
from pangu_locmoe.train.wall_clock import WallClock


class Trainer:
    """One run in one directory.

    Args:
        config: the run.
        prepared: its data.
        run_dir: where everything is written.
        init_from: a checkpoint whose weights the run starts from (an inherited model, for example);
            None: random weights.
        world: this process's place in the job; None: a single process.
        callbacks: of the caller, told last of every step and row.
        clock: since the start of the run, if that was earlier.
    """

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        run_dir: Path,
        init_from: Optional[Path] = None,
        world: Optional[World] = None,
        callbacks: Sequence[jobs.Callback] = (),
        clock: Optional[WallClock] = None,
    ) -> None:
        self.clock = clock or WallClock()
        self.config = config
        self.prepared = prepared
        self.run_dir = run_dir
        self.world = world or World.of(config)
        self.topology = self.world.topology
        self.model = PanguSigma(
            config, prepared.token_counts, self.topology, self.world.exchange, self.world.tensor
        )
        self.notes: List[str] = []  # on the checkpoint it starts from or goes on from
        if init_from is not None:
            with together(self.world.communicator):
                folder = find_checkpoint(init_from)
                step = read_state(folder)["step"]
                self.notes.append(f"weights from {folder}, step {step}")
                self.notes += passed_over(init_from, folder, WEIGHTS)
                check_tokenizer(folder, prepared.path / "tokenizer.json")
                load_weights(folder, self.model)
        self.stepper = make_stepper(self.model, config, self.world)
        self.policies = make_policies(config, self.stepper, self._load_trace)
        self.loader = BatchLoader(
            prepared, _sampler(config, prepared, self.topology), config.data.reset_at_document_end
        )
        self.evaluator = Evaluator(self.model, config, prepared, self.world)
        self.step = 0
        self.best: Optional[Dict[str, float]] = None
        self.final: Dict[str, Any] = {}
        self._added = list(callbacks)
        self._callbacks: List[jobs.Callback] = []
        self._trace: Optional[jobs.WriteTrace] = None  # rank 0's
        self._smallest_scale = False
        self._signal: Optional[int] = None  # this rank's
        self._stopped_by: Optional[int] = None  # any rank's; all ranks agree
        self._failure: Optional[str] = (
            None  # this rank's: a file beside the checkpoints that cannot be written
        )
        self._noted: Set[str] = set()

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint; False where there is none at all, and the run
        starts at step 0.

        Raises:
            CheckpointError: there are checkpoints, but none is whole; or the newest was trained on
                other data.
        """
        communicator = self.world.communicator
        with together(communicator):
            if self.world.is_first:
                self._note(recover(self.run_dir))
        with together(communicator):
            return self._resume()

    def _resume(self) -> bool:
        folder = latest_whole_checkpoint(self.run_dir)
        if folder is None:
            broken = step_folders(self.run_dir)
            if broken:
                raise CheckpointError(
                    f"{damage(broken[-1])}; no older checkpoint is whole: begin again in "
                    "another --run-dir"
                )
            return False
        self.notes += passed_over(self.run_dir, folder)
        self.notes += check_data(folder, self.prepared)
        try:
            self._restore(folder, read_state(folder))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / 'state.json'} is not of a run that can go on: "
                f"{type(error).__name__}: {error}"
            ) from None
        return True

    def _restore(self, folder: Path, state: Dict[str, Any]) -> None:
        for policy in self.policies:
            policy.restore(state)
        load_weights(folder, self.model)
        load_optimizer(folder, self.stepper.optimizer, Held.by(self.model))
        self.loader.load_state_dict(state["data"])
        self.step = state["step"]
        self.best = state["best"]
        self.stepper.updates = state.get(
            "updates", self.step
        )  # runs of older versions counted skipped steps
        if self.stepper.loss_scale is not None:
            self.stepper.loss_scale.value, self.stepper.loss_scale.good_steps = state["loss_scale"]

    def run(self, progress: bool = True) -> Optional[signal.Signals]:
        """Train to the last step.

        Returns None, or the signal that stopped the run after a saved step.

        Raises:
            DivergenceError: a loss or the gradient is not finite.
            CheckpointError: a checkpoint or another file of the run cannot be written.
        """
        handlers = {number: signal.signal(number, self._on_signal) for number in stopping_signals()}
        try:
            with together(self.world.communicator):
                self._callbacks = self._make_callbacks(progress)
            while not self._stopping() and self.step < self.config.train.steps:
                self._advance()
            if self._stopped_by is not None and self.step < self.config.train.steps:
                self._save()
                self.clock.end = STOPPED
                return signal.Signals(self._stopped_by)
            if not self.final:  # resumed after the last step
                self.final = {"step": self.step, **self.evaluator()}
            self.clock.end = FINISHED
            return None
        finally:
            for callback in self._callbacks:
                with suppress(OSError):  # a full disk was reported above
                    callback.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stopping(self) -> bool:
        """Whether any rank got a signal; all ranks agree.

        Raises CheckpointError on all where one could not write.
        """
        own = Tensor([self._signal or 0, self._failure is not None], ms.int32)
        signals, failures = self.world.communicator.all_gather(own).asnumpy().T
        if failures.any():
            raise CheckpointError(first_failure(self.world.communicator, self._failure))
        # Apart from `_signal`, which a signal may set at any moment: one that comes during the
        # gather is for the next step.
        self._stopped_by = int(signals.max()) or None
        return self._stopped_by is not None

    def _advance(self) -> None:
        config = self.config
        started = time.perf_counter()
        with self.clock.spent("step"):
            batch = next(self.loader)
            rate = learning_rate(config.train, self.stepper.updates + 1)
            # A static step has slots by these, not a capacity; what is between the steps may
            # change them.
            static = self.world.exchange is not None and config.parallel.sizes == "static"
            factors = self.stepper.factors if static else None
            with profiled(self.run_dir, config.trace.profile == self.step + 1):
                result = self.stepper(batch, self.step + 1, rate)
        self.step += 1
        row = training_row(
            config,
            self.topology,
            self.step,
            result,
            rate,
            time.perf_counter() - started,
            self.stepper.capacities,
            self.stepper.expert_of_slot_LP,
            factors,
        )
        self._check_finite(result)
        if self.stepper.loss_scale is not None:
            row["loss_scale"] = self.stepper.loss_scale.value
        self._each(lambda callback: callback.on_step(self.step, result, row))
        for policy in self.policies:
            for event in policy(self.step, result):
                self._tell(event)
        last = self.step == config.train.steps
        improved = (last or self.step % config.evaluation.every == 0) and self._evaluate()
        if last or improved or self.step % config.checkpoint.every == 0:
            self._save()

    def _evaluate(self) -> bool:
        """Whether this is the best model so far."""
        with self.clock.spent("evaluation"):
            self.final = {"step": self.step, **self.evaluator()}
        if not math.isfinite(self.final["validation_loss"]):
            self._diverged(f"validation loss {self.final['validation_loss']}")
        improved = self.best is None or self.final["validation_loss"] < self.best["validation_loss"]
        if improved:
            self.best = {"step": self.step, "validation_loss": self.final["validation_loss"]}
        self._tell(self.final)
        return improved

    def _tell(self, row: Dict[str, Any]) -> None:
        self._each(lambda callback: callback.on_row(row))

    def _each(self, call: Callable[[jobs.Callback], None]) -> None:
        """A file that cannot be written ends the run after this step, on all ranks: until then
        the others count on this one.
        """
        for callback in self._callbacks:
            try:
                call(callback)
            except OSError as error:
                self._failure = self._failure or _unwritable(self.run_dir, error)

    def _note(self, lines: Sequence[str]) -> None:
        """Say each once."""
        for line in lines:
            if line not in self._noted:
                tqdm.write(f"note: {line}")
        self._noted.update(lines)

    def _save(self) -> None:
        with self.clock.spent("checkpoint"):
            self._save_checkpoint()
        self._each(lambda callback: callback.on_saved(self.step))

    def _save_checkpoint(self) -> None:
        self._each(lambda callback: callback.on_checkpoint(self.step))
        scale = self.stepper.loss_scale
        state = {
            "step": self.step,
            "updates": self.stepper.updates,
            "data": self.loader.state_dict(),
            "identity": self.prepared.identity,
            "best": self.best,
            "loss_scale": [scale.value, scale.good_steps] if scale is not None else None,
        }
        for policy in self.policies:
            state.update(policy.state())
        folder = self.run_dir / "checkpoints" / f"step-{self.step:08d}"
        tokenizer_file = self.prepared.path / "tokenizer.json"
        save_checkpoint(
            folder,
            self.config,
            tokenizer_file,
            self.model,
            self.stepper.optimizer,
            state,
            self.world,
        )
        if self.world.is_first:
            self._note(
                remove_old(
                    self.run_dir,
                    self.step,
                    self.config.checkpoint.keep,
                    int(self.best["step"]) if self.best else None,
                )
            )

    def _check_finite(self, result: StepResult) -> None:
        # At the smallest loss scale there is nothing left to halve: every further step would be
        # skipped.
        hopeless = result.skipped and self._smallest_scale
        self._smallest_scale = (
            result.skipped
            and self.stepper.loss_scale is not None
            and self.stepper.loss_scale.value == 1.0
        )
        if math.isfinite(result.losses["loss"]) and (
            math.isfinite(result.grad_norm) or (result.skipped and not hopeless)
        ):
            return
        broken = np.flatnonzero(~np.isfinite(result.layer_sums))
        where = (
            f"first in layer {broken[0]}"
            if len(broken)
            else "first in the loss"
            if math.isfinite(result.grad_norm)
            else "first in the gradient"
        )
        self._diverged(f"loss {result.losses['loss']}, gradient norm {result.grad_norm}, {where}")

    def _diverged(self, what: str) -> NoReturn:
        folder = latest_whole_checkpoint(self.run_dir)
        raise DivergenceError(
            f"step {self.step}: {what}; last good checkpoint: {folder or 'none yet'}; try "
            "a lower train.learning_rate"
        )

    def _make_callbacks(self, progress: bool) -> List[jobs.Callback]:
        if not self.world.is_first:
            return self._added
        try:
            return [
                *self._writers(),
                *([jobs.ShowProgress(self.config, self.step)] if progress else []),
                *self._added,
            ]
        except OSError as error:
            raise CheckpointError(_unwritable(self.run_dir, error)) from None

    def _writers(self) -> List[jobs.Callback]:
        every = self.config.train.log_every
        last = self.step
        self._trace = jobs.WriteTrace(self.run_dir / "load.npz", self.config, last)
        self.clock.open(self.run_dir / TIME_FILE, last)
        return [
            jobs.WriteMetrics(self.run_dir / "metrics.jsonl", every, last),
            jobs.WriteTensorBoard(self.run_dir / "tensorboard", every, last),
            self._trace,
            jobs.WriteTimeline(self.run_dir / "timeline.json", self.topology),
            self.clock,
        ]

    def _load_trace(self) -> Trace:
        assert self._trace is not None  # rank 0 is asked
        return self._trace.trace

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        self._signal = number


def _unwritable(run_dir: Path, error: OSError) -> str:
    return f"{run_dir} cannot be written: {error}"


def _sampler(config: Config, prepared: Prepared, topology: Topology) -> BatchSampler:
    by_content = config.data.sharding == "content"
    return BatchSampler(
        prepared.num_sequences["train"],
        config.train.batch_size,
        config.data.mixture,
        config.train.seed,
        topology.num_nodes,
        config.data.sharding,
        topology.home_nodes(allowed_experts(config)),
        prepared.domains,
        nodes_by_content(prepared, topology.num_nodes, config.train.seed) if by_content else None,
    )
