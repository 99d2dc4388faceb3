"""A dry run of some ranks of a job, what is wrong with it, and its report."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence

from pangu_locmoe.check.communication import Weight
from pangu_locmoe.check.dry_run.libraries import TRIED_SYMBOLS, manifest
from pangu_locmoe.check.dry_run.process import run_rank
from pangu_locmoe.check.dry_run.reading import RankRun, difference, read_rank
from pangu_locmoe.check.memory import Memory, estimate
from pangu_locmoe.config import Config
from pangu_locmoe.parallel.topology import Topology


@dataclass(frozen=True)
class DryRun:
    """Ranks' steps as MindSpore's Ascend back end makes them.

    chip: what it was told the device is.
    mindspore: its version.
    runs: of the ranks.
    estimates: `check`'s memory of the same ranks and layers; none of a rank that failed.
    notes: what a reader should know.
    """

    chip: str
    mindspore: str
    runs: List[RankRun]
    estimates: Dict[int, Memory]
    notes: List[str]

    @property
    def problems(self) -> List[str]:
        """A line for each thing that a job would stumble over."""
        found = []
        for run in self.runs:
            if run.failure is not None:
                found.append(f"rank {run.rank}: the step does not compile: {run.failure}")
            if run.host_python:
                found.append(
                    f"rank {run.rank}: Python on the host in the middle of the step: "
                    f"{', '.join(run.host_python)}"
                )
            if run.on_host:
                found.append(f"rank {run.rank}: no Ascend kernel: {', '.join(run.on_host)}")
        whole = [run for run in self.runs if run.failure is None]
        pairs = itertools.combinations(whole, 2)
        return [*found, *filter(None, (difference(one, two) for one, two in pairs))]

    def to_dict(self) -> Dict[str, Any]:
        """For --json."""
        return {
            "chip": self.chip,
            "mindspore": self.mindspore,
            "problems": self.problems,
            "notes": self.notes,
            "ranks": [self._rank_dict(run) for run in self.runs],
        }

    def format(self) -> str:
        """For people."""
        lines = [
            f"dry run: MindSpore {self.mindspore}'s Ascend back end for {self.chip}, no device"
        ]
        for run in self.runs:
            lines += self._rank_lines(run)
        whole = [run.rank for run in self.runs if run.failure is None]
        if len(whole) > 1 and not self.problems:
            ranks = ", ".join(map(str, whole))
            lines.append(f"ranks {ranks} take the collectives that they share in the same order")
        lines += [f"note: {note}" for note in self.notes]
        if not self.problems:
            lines.append("every operator has an Ascend kernel, and no Python is in the step")
        return "\n".join(lines)

    def _rank_dict(self, run: RankRun) -> Dict[str, Any]:
        values = asdict(run)
        del values["weights"]
        memory = self.estimates.get(run.rank)
        values["estimated_bytes"] = None if memory is None else comparable(memory)
        return values

    def _rank_lines(self, run: RankRun) -> List[str]:
        if run.failure is not None:
            return [f"rank {run.rank}: {run.failure}"]
        lines = [f"rank {run.rank}: {run.launches} launches; {run.seconds:.0f} s"]
        for kind, kernels in run.kernels.items():
            counted = ", ".join(f"{name} {count}" for name, count in kernels.items())
            lines.append(f"  {kind}, {sum(kernels.values())}: {counted}")
        for each in run.communication:
            if each.operator.startswith("AlltoAll"):
                lines.append(
                    f"  {each.graph}, {each.direction}: under {each.operator} in {each.group} "
                    f"{each.products} matrix products, {each.kernels} kernels"
                )
        lines += _reductions(run)
        memory = self.estimates[run.rank]
        lines.append(
            f"  memory without HCCL's buffers, GB: planned {run.peak_bytes / 1e9:.3f}, estimated "
            f"{comparable(memory) / 1e9:.3f}; operators' workspaces are in neither"
        )
        return lines


def dry_run(
    config: Config, num_ranks: int, ranks: Sequence[int], libraries: Path, chip: str
) -> DryRun:
    """Compile the steps of some ranks with MindSpore's Ascend back end and walk through them.

    One after the other, each in a process of its own.

    Args:
        config: the run, with parallel.sizes: static, and as many layers as are to be compiled.
        num_ranks: of the job.
        ranks: which.
        libraries: of `libraries.ready`.
        chip: its name as CANN has it.

    Raises:
        TopologyError: the number of ranks does not fit.
    """
    topology = Topology.from_config(config, num_ranks)
    runs = []
    for rank in ranks:
        with tempfile.TemporaryDirectory(prefix="locmoe-dry-run-") as name:
            exit_code = run_rank(config, num_ranks, rank, libraries, chip, Path(name))
            runs.append(read_rank(Path(name), rank, exit_code))
    built = manifest(libraries)
    notes = []
    if built["symbols_sha256"] != TRIED_SYMBOLS:
        notes.append(
            f"MindSpore {built['mindspore']} wants other functions of CANN than the version with "
            "which dry runs were tried: a failure may be of the stand-ins"
        )
    estimates = {run.rank: _estimate(config, topology, run) for run in runs if run.failure is None}
    return DryRun(chip, built["mindspore"], runs, estimates, notes)


def comparable(memory: Memory) -> int:
    """Bytes of an estimate without what a dry run counts as 0: HCCL's buffers."""
    return memory.total - memory.buffers


def _estimate(config: Config, topology: Topology, run: RankRun) -> Memory:
    weights = [
        Weight(weight["name"], tuple(weight["shape"]), weight["kind"]) for weight in run.weights
    ]
    return estimate(config, topology, run.rank, weights, len(run.groups))


def _reductions(run: RankRun) -> List[str]:
    """Of the collectives that are no exchange, how many have computation under them."""
    lines = []
    kinds = dict.fromkeys((each.direction, each.operator) for each in run.communication)
    for direction, operator in kinds:
        if operator.startswith("AlltoAll"):
            continue
        alike = [
            each
            for each in run.communication
            if (each.direction, each.operator) == (direction, operator)
        ]
        covered = sum(each.kernels > 0 for each in alike)
        lines.append(f"  {direction}: {len(alike)} {operator}, {covered} with kernels under them")
    return lines
