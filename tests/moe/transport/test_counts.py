"""Who gets a slot of an expert that serves several ranks, against the plainest loop.

The layer itself: tests/distributed.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.transport.counts import assign_slots


@st.composite
def arrivals(draw):
    """(rows of each source for each local expert, affinities with many ties)."""
    sources = draw(st.integers(1, 4))
    experts = draw(st.integers(1, 4))
    counts = draw(
        st.lists(
            st.lists(st.integers(0, 5), min_size=experts, max_size=experts),
            min_size=sources,
            max_size=sources,
        )
    )
    counts_RG = np.array(counts)
    total = int(counts_RG.sum())
    affinity = draw(
        st.lists(st.sampled_from([0.25, 0.5, 0.75, 1.0]), min_size=total, max_size=total)
    )
    return counts_RG, np.array(affinity, np.float32)


def by_hand(counts_RG: np.ndarray, affinity_M: np.ndarray, capacity: int):
    """The rows each expert keeps, best first; ties by source, then by position."""
    rows_G: list[list[int]] = [[] for _ in range(counts_RG.shape[1])]
    row = 0
    for source in counts_RG:
        for expert, count in enumerate(source):
            rows_G[expert] += range(row, row + count)
            row += count
    ordered = [sorted(rows, key=lambda row: (-affinity_M[row], row)) for rows in rows_G]
    return [rows[:capacity] if capacity != DROPLESS else rows for rows in ordered], [
        len(rows) for rows in rows_G
    ]


@settings(max_examples=300, deadline=None)
@given(arrivals(), st.integers(0, 6))
def test_an_expert_keeps_its_best_rows(arrival, capacity):
    counts_RG, affinity_M = arrival
    slot_M, slots, dropped_G = assign_slots(counts_RG, affinity_M, capacity)
    kept_G, loads = by_hand(counts_RG, affinity_M, capacity)
    assert slots == max(len(kept) for kept in kept_G)
    assert dropped_G.tolist() == [load - len(kept) for load, kept in zip(loads, kept_G)]
    wanted_M = np.zeros(len(affinity_M), int)
    for expert, kept in enumerate(kept_G):
        wanted_M[kept] = expert * slots + np.arange(len(kept)) + 1
    np.testing.assert_array_equal(slot_M, wanted_M)
    assert slot_M.dtype == np.int32


@settings(max_examples=100, deadline=None)
@given(arrivals(), st.integers(0, 6))
def test_without_affinities_the_first_rows_stay(arrival, capacity):
    counts_RG, affinity_M = arrival
    got = assign_slots(counts_RG, None, capacity)
    wanted = assign_slots(counts_RG, np.ones_like(affinity_M), capacity)
    for one, other in zip(got, wanted):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=100, deadline=None)
@given(arrivals(), st.integers(1, 6))
def test_the_number_of_sources_does_not_matter(arrival, capacity):
    """The same rows from one source, in the order of the batch, are kept and dropped alike."""
    counts_RG, affinity_M = arrival
    expert_M = np.concatenate(
        [np.repeat(np.arange(counts_RG.shape[1]), source) for source in counts_RG]
    )
    slot_M, slots, dropped_G = assign_slots(counts_RG, affinity_M, capacity)
    sorted_M = np.argsort(expert_M, kind="stable")
    once_M, once, dropped_once_G = assign_slots(
        counts_RG.sum(0)[None], affinity_M[sorted_M], capacity
    )
    np.testing.assert_array_equal(slot_M[sorted_M], once_M)
    assert once == slots
    np.testing.assert_array_equal(dropped_G, dropped_once_G)


def test_no_rows_at_all():
    slot_M, slots, dropped_G = assign_slots(np.zeros((3, 2), int), None, 4)
    assert (slot_M.shape, slots, dropped_G.tolist()) == ((0,), 0, [0, 0])
