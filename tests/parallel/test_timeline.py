"""Spans of time as a Chrome trace."""

from __future__ import annotations

import time

import numpy as np
import pytest
from mindspore import Tensor, nn

from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.timeline import Span, Timeline, chrome_trace, gather_spans
from pangu_locmoe.parallel.topology import Topology


def test_a_trace_by_hand():
    """Two nodes of one rank; times in microseconds since the first span."""
    spans = [
        [Span("exchange", 100.0, 100.5, 64), Span("experts", 100.5, 100.75)],
        [Span("reduction", 100.25, 101.0)],
    ]
    trace = chrome_trace(spans, Topology(2, 1, 2, 2))
    assert [event for event in trace["traceEvents"] if event["ph"] == "X"] == [
        {
            "ph": "X",
            "name": "exchange",
            "pid": 0,
            "tid": 1,
            "ts": 0,
            "dur": 500_000,
            "args": {"bytes": 64},
        },
        {"ph": "X", "name": "experts", "pid": 0, "tid": 0, "ts": 500_000, "dur": 250_000},
        {"ph": "X", "name": "reduction", "pid": 1, "tid": 3, "ts": 250_000, "dur": 750_000},
    ]
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    assert names == [
        "node 0",
        "rank 0: computation",
        "rank 0: communication",
        "node 1",
        "rank 1: computation",
        "rank 1: communication",
    ]


def test_gathered_spans_keep_microseconds_and_large_numbers():
    timeline = Timeline()
    timeline.add("exchange", time.time() - 0.25, sent=5 * 2**30 + 3)
    timeline.add("step", time.time() - 1.5)
    (got,) = gather_spans(timeline, SingleProcess())
    for mine, wanted in zip(got, timeline.spans):
        assert (mine.kind, mine.sent) == (wanted.kind, wanted.sent)
        assert (mine.start, mine.end) == pytest.approx((wanted.start, wanted.end), abs=2e-6)


def test_cells_are_watched_for_a_while():
    timeline = Timeline()
    cell = nn.ReLU()
    with timeline.watch([cell]):
        cell(Tensor(np.ones(3, np.float32)))
    cell(Tensor(np.ones(3, np.float32)))
    assert [span.kind for span in timeline.spans] == ["experts"]
