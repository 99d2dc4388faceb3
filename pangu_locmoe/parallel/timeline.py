"""What each rank does when in one step: its exchanges and its experts' computation, as a Chrome
trace.

Open the file in chrome://tracing or ui.perfetto.dev. Every rank has two lines, so that what
overlaps is seen.

Letters: R ranks, X spans.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Sequence

import numpy as np
from mindspore import Tensor, nn

from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.topology import Topology

KINDS = ("step", "experts", "exchange", "reduction")
_COMMUNICATION = ("exchange", "reduction")


@dataclass(frozen=True)
class Span:
    """One thing that a rank did; start and end in seconds since the epoch, bytes that it sent to
    others.
    """

    kind: str
    start: float
    end: float
    sent: int = 0


class Timeline:
    """The spans of one rank."""

    def __init__(self) -> None:
        self.spans: List[Span] = []

    def add(self, kind: str, started: float, sent: int = 0) -> None:
        """What began at `started` ends now."""
        self.spans.append(Span(kind, started, time.time(), sent))

    @contextmanager
    def watch(self, cells: Sequence[nn.Cell]) -> Iterator[None]:
        """Note the forward computation of cells while this lasts. PyNative."""
        started: List[float] = []

        def before(cell: nn.Cell, inputs: Any) -> None:
            started.append(time.time())

        def after(cell: nn.Cell, inputs: Any, output: Any) -> None:
            self.add("experts", started.pop())

        hooks = [
            hook
            for cell in cells
            for hook in (cell.register_forward_pre_hook(before), cell.register_forward_hook(after))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def gather_spans(timeline: Timeline, communicator: Communicator) -> List[List[Span]]:
    """The spans of every rank, on every rank; times to the microsecond."""
    second = np.asarray(
        [int(min(span.start for span in timeline.spans)), len(timeline.spans)], np.int32
    )
    shared_R2 = communicator.all_gather(Tensor(second)).asnumpy()
    base = int(shared_R2[:, 0].min())
    most = int(shared_R2[:, 1].max())
    own_X5 = np.zeros((most, 5), np.int32)
    for row, span in zip(own_X5, timeline.spans):
        row[:] = (
            KINDS.index(span.kind),
            round((span.start - base) * 1e6),
            round((span.end - base) * 1e6),
            *divmod(span.sent, 2**20),
        )
    shared_RX5 = (
        communicator.all_gather(Tensor(own_X5.reshape(-1)))
        .asnumpy()
        .reshape(-1, most, 5)
        .astype(np.int64)
    )
    return [
        [
            Span(KINDS[kind], base + start / 1e6, base + end / 1e6, int(mebi * 2**20 + rest))
            for kind, start, end, mebi, rest in rows_X5[:count]
        ]
        for rows_X5, count in zip(shared_RX5, shared_R2[:, 1])
    ]


def chrome_trace(spans_RX: Sequence[Sequence[Span]], topology: Topology) -> Dict[str, Any]:
    """The trace: a process for each node, two threads for each rank; times in microseconds since
    the first span.
    """
    first = min(span.start for spans_X in spans_RX for span in spans_X)
    events: List[Dict[str, Any]] = []
    for rank, spans_X in enumerate(spans_RX):
        node = topology.node_of_rank(rank)
        events.append(
            {"ph": "M", "name": "process_name", "pid": node, "args": {"name": f"node {node}"}}
        )
        for line, what in enumerate(("computation", "communication")):
            events.append(
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": node,
                    "tid": 2 * rank + line,
                    "args": {"name": f"rank {rank}: {what}"},
                }
            )
        for span in spans_X:
            event = {
                "ph": "X",
                "name": span.kind,
                "pid": node,
                "tid": 2 * rank + (span.kind in _COMMUNICATION),
                "ts": round((span.start - first) * 1e6),
                "dur": round((span.end - span.start) * 1e6),
            }
            events.append(
                {**event, "args": {"bytes": span.sent}} if span.kind == "exchange" else event
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
