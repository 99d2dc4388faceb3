"""What a rank of a dry run became, read from what MindSpore left in its folder.

Neither its log nor the columns of its files are an interface: where nothing is found in them the
dry run has failed, and nothing is called good.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from pangu_locmoe.check.dry_run.process import LOG, RESULT

Row = Dict[str, str]

KINDS = {
    "opapi_kernel": "aclnn",  # one call of an operator's two functions
    "acl_kernel": "aclop",  # the older way: by name, compiled when it is first met
    "hccl_kernel": "hccl",
    "rt_kernel": "views and events",  # nothing is computed
    "internal_kernel": "internal",
    "atb_kernel": "atb",
    "cpu_kernel": "host",
}
PRODUCTS = ("BatchMatMul", "MatMul", "GroupedMatmul", "FlashAttentionScore")
COLLECTIVES = ("AlltoAllV", "AlltoAll", "AllReduce", "AllGather", "ReduceScatter", "Broadcast")
# Their members hand over as much as each other. What one sends in an All-to-All, another receives.
_EVEN = ("AllReduce", "AllGather", "ReduceScatter", "Broadcast")
_VIEWS = ("Reshape", "ExpandDims", "Squeeze", "Stream")


@dataclass(frozen=True)
class Communication:
    """One collective of a graph, and what the device computes before it waits for its result.

    graph: its name; a step in fp16 or with accumulation has several.
    operator: such as AlltoAllV.
    direction: forward or backward; what follows the backward pass is backward, too.
    group: name of the group.
    products: matrix products between its start and the first wait for it.
    kernels: all kernels there.
    """

    graph: str
    operator: str
    direction: str
    group: str
    products: int
    kernels: int


@dataclass(frozen=True)
class Collective:
    """What the members of a group must agree on when they meet."""

    group: str
    operator: str
    dtype: str
    sizes: Tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.operator, self.dtype, *self.sizes, "in", self.group))


@dataclass(frozen=True)
class RankRun:
    """One rank.

    kernels: kind -> operator -> how many.
    launches: entries in the order of execution that are kernels, of all graphs.
    on_host: operators without an Ascend kernel, for which MindSpore takes the CPU's.
    host_python: nodes that run Python on the host.
    communication: of all graphs, in order.
    collectives: the same as other ranks see it, in the order of launches.
    weights: name, shape and kind of each parameter.
    groups: names and ranks.
    peak_bytes: of the memory that MindSpore planned. Operators' workspaces and HCCL's buffers count
        as 0.
    seconds: that the dry run took.
    failure: why there is nothing of all this; None: there is.
    """

    rank: int
    kernels: Dict[str, Dict[str, int]] = field(default_factory=dict)
    launches: int = 0
    on_host: List[str] = field(default_factory=list)
    host_python: List[str] = field(default_factory=list)
    communication: List[Communication] = field(default_factory=list)
    collectives: List[Collective] = field(default_factory=list)
    weights: List[Dict[str, Any]] = field(default_factory=list)
    groups: Dict[str, List[int]] = field(default_factory=dict)
    peak_bytes: int = 0
    seconds: float = 0.0
    failure: Optional[str] = None


def read_rank(folder: Path, rank: int, exit_code: int) -> RankRun:
    """What a rank left in its folder."""
    log = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    host_python = _host_python(folder, log)
    on_host = sorted(set(re.findall(r"backoff CPU kernel, node: ?(\S+)", log)))
    if exit_code:
        return RankRun(
            rank, on_host=on_host, host_python=host_python, failure=failure(log, exit_code)
        )
    kernels: Dict[str, Counter] = {}
    for operator, kind in re.findall(r"kernel opname:(\w+), kernel type:(\w+)", log):
        kernels.setdefault(KINDS.get(kind, kind), Counter())[operator] += 1
    rows = _rows(folder, "execute_order.csv")
    if not (kernels and rows and (folder / RESULT).is_file()):
        return RankRun(
            rank,
            failure="nothing was found in MindSpore's log or order of execution; is it another "
            "version than the tried one?",
        )
    graphs: Dict[str, List[Row]] = {}
    for row in rows:
        graphs.setdefault(_graph(row), []).append(row)
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return RankRun(
        rank,
        {kind: dict(sorted(found.items())) for kind, found in sorted(kernels.items())},
        sum(not _name(row).startswith(_VIEWS) for row in rows),
        on_host,
        host_python,
        [each for name, order in graphs.items() for each in overlaps(name, order)],
        [_collective(row) for row in _rows(folder, "comm_execute_order.csv")],
        result["weights"],
        result["groups"],
        result["peak_bytes"],
        result["seconds"],
    )


def overlaps(graph: str, rows: Sequence[Row]) -> List[Communication]:
    """The collectives of a graph in order.

    The first wait for one is a StreamRecv on another stream, for an event that the collective's
    stream sends after it. Without one nothing waits before the graph ends.
    """
    names = [_name(row) for row in rows]
    waits = _waits(rows, names)
    turn = _turn(rows, names)
    found = []
    for start, row in enumerate(rows):
        operator = names[start].split("-")[0]
        if operator not in COLLECTIVES:
            continue
        stream = row["stream_id"]
        end = len(rows)
        for wait, sent, source in waits:
            if sent > start and source == stream and rows[wait]["stream_id"] != stream:
                end = wait
                break
        under = [
            name
            for name, other in zip(names[start:end], rows[start:end])
            if other["stream_id"] != stream and not name.startswith(_VIEWS)
        ]
        products = sum(name.startswith(PRODUCTS) for name in under)
        direction = "forward" if start < turn else "backward"
        found.append(Communication(graph, operator, direction, row["group"], products, len(under)))
    return found


def difference(mine: RankRun, other: RankRun) -> Optional[str]:
    """Where two ranks take the collectives of the groups that they share in different orders.

    A device runs its collectives one after the other, those of all groups: two ranks that take them
    in different orders wait for each other for ever.
    """
    shared = {each.group for each in mine.collectives} & {each.group for each in other.collectives}
    first, second = (
        [each for each in run.collectives if each.group in shared] for run in (mine, other)
    )
    for number, (one, two) in enumerate(zip(first, second), start=1):
        if one != two:
            return (
                f"collective {number} of the groups that ranks {mine.rank} and {other.rank} share "
                f"is {one} on the first, {two} on the second"
            )
    if len(first) != len(second):
        return (
            f"ranks {mine.rank} and {other.rank} have {len(first)} and {len(second)} collectives "
            "of the groups that they share"
        )
    return None


def failure(log: str, exit_code: int) -> str:
    """One line on what ended the process."""
    lines = [
        line
        for line in log.splitlines()
        if line.strip("- ") and not re.match(r"\[(DEBUG|INFO|WARNING|ERROR|CRITICAL)\]", line)
    ]
    said = [
        line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b|Fatal Python", line)
    ]
    last = said or lines[-1:]
    return f"{last[0].strip()} (exit code {exit_code})" if last else f"exit code {exit_code}"


def _waits(rows: Sequence[Row], names: Sequence[str]) -> List[Tuple[int, int, str]]:
    """Of each StreamRecv: its row, the row of the event that it waits for, that one's stream."""
    waits = []
    sent: Dict[str, Tuple[int, str]] = {}
    for number, row in enumerate(rows):
        if names[number].startswith("StreamSend"):
            sent[row["event_id"]] = (number, row["stream_id"])
        elif names[number].startswith("StreamRecv") and row["event_id"] in sent:
            waits.append((number, *sent[row["event_id"]]))
    return waits


def _host_python(folder: Path, log: str) -> List[str]:
    actors = "".join(
        path.read_text(encoding="utf-8", errors="replace")
        for path in folder.glob("graphs/rank_*/actor_set/final_*.ir")
    )
    found = re.findall(r"PyExecute-op\d+", actors)
    return sorted(set(found or re.findall(r"Operator name: (PyExecute)", log)))


def _collective(row: Row) -> Collective:
    operator = row["primitive"]
    sizes = (row["input_size"], row["output_size"]) if operator in _EVEN else ()
    return Collective(row["group"], operator, row["input_type"], sizes)


def _graph(row: Row) -> str:
    found = re.search(r"@(\w+):", row["node_info"])
    return found[1] if found else "graph"


def _name(row: Row) -> str:
    return row["node_name"].rsplit("/", 1)[-1]


def _turn(rows: Sequence[Row], names: Sequence[str]) -> int:
    """Where the backward pass begins: at the first product or collective that is a gradient's. Not
    all gradients are called that: those of a Cell with its own are not.
    """
    for number, row in enumerate(rows):
        gradient = row["node_name"].startswith(("Gradients/", "Default/reduce-"))
        if gradient and names[number].startswith((*PRODUCTS, *COLLECTIVES)):
            return number
    return len(rows)


def _rows(folder: Path, name: str) -> List[Row]:
    """Of one of the files that MindSpore writes when the process ends."""
    paths = sorted(folder.glob(f"graphs/rank_*/execute_order/{name}"))
    if not paths:
        return []
    with paths[0].open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
