"""EPLB: the published answer, and what every balanced packing must hold to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.placement import rebalance

WEIGHT_LE = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_the_published_example():
    expert_of_slot_LP, places, copies_LE = rebalance(np.array(WEIGHT_LE), 16, 4, 2, 8)
    assert expert_of_slot_LP.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert copies_LE.sum(axis=1).tolist() == [16, 16]
    for layer, expert_of_slot_P in enumerate(expert_of_slot_LP):
        for expert, places_C in enumerate(places[layer]):
            assert (
                sorted(places_C[places_C >= 0])
                == np.flatnonzero(expert_of_slot_P == expert).tolist()
            )


def test_groups_that_nodes_do_not_divide_are_global():
    globally = rebalance(np.array(WEIGHT_LE), 16, 1, 1, 8)[0]
    np.testing.assert_array_equal(rebalance(np.array(WEIGHT_LE), 16, 3, 2, 8)[0], globally)


@given(
    st.integers(0, 10**6),
    st.sampled_from(
        [(8, 8, 4, 2, 4), (8, 12, 1, 2, 4), (8, 16, 2, 2, 8), (6, 12, 2, 1, 3), (12, 24, 4, 4, 8)]
    ),
)
@settings(max_examples=30, deadline=None)
def test_every_expert_is_placed_and_groups_stay_together(seed, sizes):
    experts, slots, groups, nodes, ranks = sizes
    weight_LE = np.random.default_rng(seed).integers(0, 100, (3, experts))
    expert_of_slot_LP, _, copies_LE = rebalance(weight_LE, slots, groups, nodes, ranks)
    for expert_of_slot_P, copies_E in zip(expert_of_slot_LP, copies_LE):
        assert np.bincount(expert_of_slot_P, minlength=experts).tolist() == copies_E.tolist()
        assert copies_E.min() >= 1
        if groups % nodes == 0:
            for group in range(groups):
                assert (
                    len(
                        {
                            slot * nodes // slots
                            for slot in np.flatnonzero(
                                expert_of_slot_P // (experts // groups) == group
                            )
                        }
                    )
                    == 1
                )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 1, 2, 4), "slots (10) must be at least the experts (12)"),
        ((14, 1, 2, 4), "slots (experts plus copies) (14) must be divisible by ranks (4)"),
        ((16, 5, 2, 4), "experts (12) must be divisible by groups (5)"),
        ((16, 1, 3, 4), "ranks (4) must be divisible by nodes (3)"),
        ((16, 1, 0, 4), "nodes (0) must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(DataError) as caught:
        rebalance(np.array(WEIGHT_LE), *sizes)
    assert str(caught.value) == message
