"""What happens beside the training itself: one job each."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Iterator, Tuple

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from pangu_locmoe.config import Config
from pangu_locmoe.expert_load.trace import Trace, TraceWriter
from pangu_locmoe.files import json_text, write_atomic
from pangu_locmoe.parallel.timeline import chrome_trace
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.metrics import MetricsFile, Row
from pangu_locmoe.train.step import StepResult


def scalars(group: str, row: Row) -> Iterator[Tuple[str, float]]:
    """Every number of a row under the name it has in TensorBoard and the like: train/loss,
    validation/bits_per_byte_by_domain/zh.
    """
    for name, value in row.items():
        values = value.items() if isinstance(value, dict) else [(None, value)]
        for domain, number in values:
            if isinstance(number, (int, float)) and name != "step":
                yield f"{group}/{name}" + (f"/{domain}" if domain else ""), number


class Callback:
    """Called by the loop. Override what the job needs."""

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        """After each optimizer step, with its training row."""

    def on_row(self, row: Row) -> None:
        """With each validation row and each event."""

    def on_checkpoint(self, step: int) -> None:
        """Just before a checkpoint of this step is written: bring files up to this step."""

    def on_saved(self, step: int) -> None:
        """With each checkpoint that is whole."""

    def close(self) -> None:
        """At the end of the run, however it ends."""


class WriteMetrics(Callback):
    """metrics.jsonl."""

    def __init__(self, path: Path, every: int, last_step: int) -> None:
        self._file = MetricsFile(path, last_step)
        self._every = every

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        if step % self._every == 0 or step == 1:
            self._file.write(row)

    def on_row(self, row: Row) -> None:
        self._file.write(row)

    def close(self) -> None:
        self._file.close()


class WriteTensorBoard(Callback):
    """TensorBoard event files with every number of every row."""

    def __init__(self, folder: Path, every: int, last_step: int) -> None:
        # Not tensorboardX's SummaryWriter: its thread dies when the disk is full, and the run would
        # wait for it for ever.
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._every = every
        # Readers then leave out what a run wrote after the checkpoint it is resumed from.
        self._writer.write_event(
            Event(
                wall_time=time.time(),
                step=last_step + 1,
                session_log=SessionLog(status=SessionLog.START),
            )
        )

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        if step % self._every == 0 or step == 1:
            self._scalars("train", row)

    def on_row(self, row: Row) -> None:
        if "event" not in row:
            self._scalars("validation", row)

    def on_checkpoint(self, step: int) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _scalars(self, group: str, row: Row) -> None:
        values = [
            Summary.Value(tag=tag, simple_value=number) for tag, number in scalars(group, row)
        ]
        self._writer.write_event(
            Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
        )


class WriteTrace(Callback):
    """load.npz.

    Written at checkpoints, which a resumed run goes on from, and by time, for a run that is killed
    and not resumed.
    """

    def __init__(self, path: Path, config: Config, last_step: int) -> None:
        self._trace = TraceWriter(path, config.trace.every, config.trace.max_rows, last_step)

    @property
    def trace(self) -> Trace:
        """The rows so far, those of an earlier part of the run among them."""
        return self._trace.trace

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        if result.load_LNE.size:
            self._trace.add(step, result.load_LNE, result.dropped_LE)

    def on_checkpoint(self, step: int) -> None:
        self._trace.flush()

    def close(self) -> None:
        self._trace.flush()


class WriteTimeline(Callback):
    """timeline.json, after the step of trace.timeline."""

    def __init__(self, path: Path, topology: Topology) -> None:
        self._path = path
        self._topology = topology

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        if result.spans is not None:
            write_atomic(self._path, json_text(chrome_trace(result.spans, self._topology)).encode())


class ShowProgress(Callback):
    """A bar with loss, tokens per second and the time left."""

    def __init__(self, config: Config, last_step: int) -> None:
        # Nothing but the validation lines where standard error is not a terminal.
        self._bar = tqdm(
            total=config.train.steps,
            initial=last_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=None,
        )
        self._loss = math.nan
        self._bound = "exact" if config.moe.capacity.policy == "bound" else "exponential"

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        self._loss = row["loss"] if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * row["loss"]
        self._bar.set_postfix_str(
            f"loss {self._loss:.3f}, {row['tokens_per_second']:.0f} tokens/s", refresh=False
        )
        self._bar.update()

    def on_row(self, row: Row) -> None:
        if "validation_loss" in row:
            text = ", ".join(
                f"{domain} {value:.3f}" for domain, value in row["bits_per_byte_by_domain"].items()
            )
            self._bar.write(
                f"step {row['step']}: validation loss {row['validation_loss']:.4f}, bits "
                f"per byte {row['bits_per_byte']:.4f} ({text})"
            )

        for layer in row.get("layers", []) if row.get("event") == "capacity" else []:
            if layer["set_by"] == "max_drop":
                self._bar.write(
                    f"note: step {row['step']}, layer {layer['layer']}: the bound is "
                    f"{layer[self._bound]:.3g}; capacity {layer['capacity']}, "
                    "of which moe.capacity.max_drop is the reason"
                )

    def close(self) -> None:
        self._bar.close()
