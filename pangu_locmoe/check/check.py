"""`pangu-locmoe check`: an Ascend job's step, compiled without devices and held against what it
must communicate.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from pangu_locmoe.check.communication import (
    Weight,
    buffer_megabytes,
    communication_plan,
    differences,
)
from pangu_locmoe.check.dry_run.process import deep_stack
from pangu_locmoe.check.memory import Memory, estimate
from pangu_locmoe.config import Config
from pangu_locmoe.errors import ConfigError, TopologyError
from pangu_locmoe.model.size import num_params
from pangu_locmoe.moe.slot_sizes import certain_drops
from pangu_locmoe.parallel.operation import Operation, node_bytes, topology_groups
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.simulate.devices import Device

MOST_LAYERS = 12  # a deeper stack compiles for minutes, and its layers are alike


@dataclass(frozen=True)
class Check:
    """The step of one rank, and what is wrong with it.

    operations: the plan's, which are the graph's where there are no differences.

    differences: where the graph is not what the plan says, a line each; empty if it is.
    device: what `memory` is held against; None: nothing.
    """

    config: Config
    topology: Topology
    rank: int
    operations: List[Operation]
    groups: Dict[str, Tuple[int, ...]]
    weights: List[Weight]
    memory: Memory
    differences: List[str]
    notes: List[str]
    device: Optional[Device] = None

    def to_dict(self) -> Dict[str, Any]:
        """For --json."""
        return {
            "ranks": self.topology.num_ranks,
            "rank": self.rank,
            "nodes": self.topology.num_nodes,
            "agrees": not self.differences,
            "differences": self.differences,
            "notes": self.notes,
            "groups": [
                {"name": name, "ranks": list(ranks), "buffer_bytes": self.buffer_bytes}
                for name, ranks in self.groups.items()
            ],
            "operations": self.rows(),
            "memory": self.memory.to_dict(),
            "device": None if self.device is None else self.device.to_dict(),
            "fits": None if self.device is None else self.too_large is None,
            "hccl_buffer_megabytes": buffer_megabytes(self.config, self.topology.num_ranks),
        }

    @property
    def too_large(self) -> Optional[str]:
        """One line where the device's memory does not hold the rank's part; None where it does,
        or no device was named.
        """
        available = None if self.device is None else self.device.memory_bytes
        if self.device is None or available is None or self.memory.total <= available:
            return None
        return (
            f"does not fit: {self.memory.total / 1e9:.1f} GB of {available / 1e9:.1f} GB "
            f"({self.device.name}, rank {self.rank})"
        )

    @property
    def buffer_bytes(self) -> int:
        """Device memory of one group: HCCL keeps a buffer for sending and one for receiving."""
        return 2 * 2**20 * buffer_megabytes(self.config, self.topology.num_ranks)

    def rows(self) -> List[Dict[str, Any]]:
        """Operators that are alike as one row, with how often each runs in one optimizer step."""
        micro_batches = self.config.train.accumulation_steps
        rows = []
        for operation, count in Counter(self.operations).items():
            inside, between = node_bytes(
                operation, self.groups[operation.group], self.topology, self.rank
            )
            row = {**operation.to_dict(), "ranks": list(self.groups[operation.group])}
            row["times"] = count * (1 if operation.direction == "update" else micro_batches)
            if operation.kind == "AlltoAllV":
                row["intra_node_bytes"], row["inter_node_bytes"] = inside, between
            rows.append(row)
        return rows

    def format(self) -> str:
        """A table for people."""
        lines = [
            (
                f"rank {self.rank} of {self.topology.num_ranks} in {self.topology.num_nodes} "
                f"nodes; {num_params(self.config):,} parameters in all"
            ),
            *self.memory.format(self.config.train.precision),
        ]
        lines += [
            f"group {name}: {len(ranks)} ranks, {_bytes(self.buffer_bytes)} of HCCL buffers"
            for name, ranks in self.groups.items()
        ]
        table = [
            ("times", "operator", "pass", "group", "operand", "result", "bytes", "to other nodes")
        ]
        for row in self.rows():
            between = _bytes(row["inter_node_bytes"]) if "inter_node_bytes" in row else ""
            shapes = [f"{row['dtype']}{list(row[key])}" for key in ("shape", "result")]
            table.append(
                (
                    str(row["times"]),
                    row["kind"],
                    row["direction"],
                    row["group"],
                    *shapes,
                    _bytes(row["bytes"]),
                    between,
                )
            )
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in table
        ]
        lines += [f"note: {note}" for note in self.notes]
        if (
            self.device is not None
            and self.device.memory_bytes is not None
            and self.too_large is None
        ):
            lines.append(
                f"fits: {self.memory.total / 1e9:.1f} GB of "
                f"{self.device.memory_bytes / 1e9:.1f} GB ({self.device.name})"
            )
        if not self.differences:
            lines.append("the graph is what the plan says")
        return "\n".join(lines)


def check(config: Config, num_ranks: int, rank: int = 0, device: Optional[Device] = None) -> Check:
    """Compile one rank's step in a process of its own, compare it with the plan, and add up its
    memory.

    Raises:
        ConfigError: the configuration does not compile as one graph, or asks for what the device
            does not have.
        TopologyError: the number of ranks does not fit it.
    """
    refuse_ranks(num_ranks, [rank])
    if config.parallel.sizes != "static":
        raise ConfigError(
            "parallel.sizes = 'counts': exchanges as many tokens as are routed, in "
            "PyNative; a step compiles as one graph with static"
        )
    if device is not None:
        _check_device(config, device)
    topology = Topology.from_config(config, num_ranks)
    shallow = shallower(config)
    result = _compile(shallow, num_ranks, rank)
    weights = [
        Weight(item["name"], tuple(item["shape"]), item["kind"]) for item in result["weights"]
    ]
    found = differences(
        communication_plan(shallow, topology, rank, weights),
        [_operation(item) for item in result["operations"]],
    )
    apart = {
        "whole": 1,
        "slice": topology.tensor_parallel,
        "expert": topology.tensor_parallel * topology.expert_parallel,
    }
    held = sum(_size(weight.shape) * apart[weight.kind] for weight in weights)
    if held != num_params(shallow):
        found.append(
            f"the ranks that share the model hold {held:,} parameters, the configuration "
            f"has {num_params(shallow):,}"
        )
    found += [
        f"PyExecute, Python on the host in the middle of the graph: {expression}"
        for expression in result["host_python"]
    ]
    tokens = config.micro_batch * config.model.seq_length // topology.num_replicas
    layers = shallow.model.num_layers if config.train.fused else 0
    flash = [
        layers + max(0, layers - 1) * config.train.recompute,
        layers,
    ]  # of a recomputed block twice; the query layer is not
    if result["flash_attention"] != flash:
        found.append(
            f"flash attention, forward and backward: {flash} with train.fused = "
            f"{config.train.fused}, {result['flash_attention']} in the graph"
        )
    notes = list(certain_drops(config, topology, rank, tokens))
    if shallow is not config:
        kept = shallow.model
        all_layers = config.model
        notes.append(
            f"compiled with {kept.num_layers} of {all_layers.num_layers} layers, "
            f"{kept.num_moe_layers} of {all_layers.num_moe_layers} sparse ones; "
            "layers of a kind are alike, and the figures above are those of all layers"
        )
        weights = _deepen(weights, shallow, config)
    operations = communication_plan(config, topology, rank, weights)
    compiled = {name: tuple(ranks) for name, ranks in result["groups"].items()}
    groups = {
        **{
            operation.group: topology_groups(topology, rank)[operation.group]
            for operation in operations
        },
        **compiled,
    }
    memory = estimate(config, topology, rank, weights, len(groups))
    return Check(config, topology, rank, operations, groups, weights, memory, found, notes, device)


def refuse_ranks(num_ranks: int, ranks: Sequence[int]) -> None:
    """Raises TopologyError for what is no rank of a job."""
    if num_ranks < 2:
        raise TopologyError(f"--ranks {num_ranks}: must be at least 2")
    for rank in ranks:
        if not 0 <= rank < num_ranks:
            raise TopologyError(f"--rank {rank}: must be between 0 and {num_ranks - 1}")


def _check_device(config: Config, device: Device) -> None:
    if device.memory_bytes is None:
        raise ConfigError(f"--device {device.name}: its memory_bytes is not known")
    if config.train.fused and not device.fused_operators:
        raise ConfigError(
            f"train.fused = True: {device.name} has no flash attention for training; must be false"
        )


def shallower(config: Config) -> Config:
    """The same configuration with at most two dense and two sparse blocks, where it has more
    than MOST_LAYERS layers.
    """
    model = config.model
    if model.num_layers <= MOST_LAYERS:
        return config
    dense = min(2, model.num_layers - 1 - model.num_moe_layers)
    sparse = min(2, model.num_moe_layers)
    return config.model_copy(
        update={
            "model": model.model_copy(
                update={"num_layers": dense + sparse + 1, "num_moe_layers": sparse}
            )
        }
    )


def _deepen(weights: List[Weight], shallow: Config, config: Config) -> List[Weight]:
    """The weights of all layers from those of a shallower stack: every block has those of the
    first of its kind.
    """
    first_sparse = shallow.model.num_layers - 1 - shallow.model.num_moe_layers
    rest = [weight for weight in weights if not weight.name.startswith("blocks.")]
    blocks = []
    for index in range(config.model.num_layers - 1):
        like = (
            0 if index < config.model.num_layers - 1 - config.model.num_moe_layers else first_sparse
        )
        own = [weight for weight in weights if weight.name.startswith(f"blocks.{like}.")]
        blocks += [
            Weight(f"blocks.{index}." + weight.name.split(".", 2)[2], weight.shape, weight.kind)
            for weight in own
        ]
    return [*rest, *blocks]


def _compile(config: Config, num_ranks: int, rank: int) -> Dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        result = Path(folder) / "result.json"
        values = {"config": config.model_dump(mode="json"), "ranks": num_ranks, "rank": rank}
        request.write_text(json.dumps(values), encoding="utf-8")
        root = str(Path(__file__).resolve().parents[2])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }
        # MindSpore takes these from the environment when it is imported, and leaves files where it
        # fails.
        environment.update(RANK_SIZE=str(num_ranks), RANK_ID=str(rank))
        command = [sys.executable, "-m", "pangu_locmoe.check.compile", str(request), str(result)]
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            text=True,
            capture_output=True,
            preexec_fn=deep_stack,
        )
        if done.returncode:
            errors = [
                line
                for line in done.stderr.splitlines()
                if re.match(r"[A-Za-z_.]*(Error|Exception)\b", line)
            ]
            raise ConfigError(
                "the step does not compile: "
                f"{errors[0] if errors else f'exit code {done.returncode}'}"
            )
        loaded: Dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return loaded


def _operation(item: Dict[str, Any]) -> Operation:
    return Operation(
        item["kind"],
        item["group"],
        item["direction"],
        item["dtype"],
        tuple(item["shape"]),
        tuple(item["result"]),
        tuple(item["sent"]),
    )


def _size(shape: Tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _bytes(number: int) -> str:
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
