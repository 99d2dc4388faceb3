"""Slot factors that follow the counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pangu_locmoe.config import CapacityConfig
from pangu_locmoe.moe.slot_factors import (
    DROPS,
    MARGIN,
    RATIO,
    automatic,
    next_factors,
    starting_factors,
)
from pangu_locmoe.parallel.topology import Topology

TOPOLOGY = Topology(num_ranks=4, ranks_per_node=2, expert_parallel=4, num_experts=8)
AUTO = CapacityConfig(local_factor="auto", remote_factor="auto")
LOCAL_NE = np.repeat([[True, False], [False, True]], 4, axis=1)


def load(local: float, remote: float) -> np.ndarray:
    """[1 layer, 2 nodes, 8 experts]: each pair of a node and a local expert has `local` tokens,
    the others `remote`.
    """
    return np.where(LOCAL_NE, local, remote)[None]


def follow(
    load_LNE: np.ndarray, now: CapacityConfig, wanted: CapacityConfig = AUTO
) -> tuple[float, float]:
    after = next_factors(wanted, now, load_LNE, TOPOLOGY)
    return after.local_factor, after.remote_factor


def test_auto_begins_with_the_capacity_factor():
    start = starting_factors(AUTO)
    assert (start.local_factor, start.remote_factor) == (1.25, 1.25)
    assert (
        starting_factors(CapacityConfig(local_factor="auto", remote_factor=0.5)).remote_factor
        == 0.5
    )
    assert (
        automatic(AUTO)
        and automatic(CapacityConfig(remote_factor="auto"))
        and not automatic(CapacityConfig(local_factor=1.0))
    )


def test_local_routing_gets_local_slots():
    """84% of the tokens are local: a local pair has 1.68 of the mean, a remote one 0.32."""
    local, remote = follow(load(84, 16), starting_factors(AUTO))
    assert local == pytest.approx(RATIO**3) and 1.68 * MARGIN <= local < 1.68 * MARGIN * RATIO
    assert remote == pytest.approx(RATIO**-4) and 0.32 * MARGIN <= remote < 0.32 * MARGIN * RATIO


def test_a_number_stays():
    assert (
        follow(
            load(90, 10),
            CapacityConfig(local_factor=1.25, remote_factor=3.0),
            CapacityConfig(local_factor="auto", remote_factor=3.0),
        )[1]
        == 3.0
    )


def test_small_changes_change_nothing():
    """Between the size that is needed and the next larger one no shape is compiled."""
    now = next_factors(AUTO, starting_factors(AUTO), load(90, 10), TOPOLOGY)
    for local in (88, 80, 75, 90):
        assert follow(load(local, 100 - local), now)[0] == now.local_factor
    assert follow(load(50, 50), now)[0] < now.local_factor


def test_a_few_hot_pairs_do_not_set_the_size_for_all():
    hot = load(50, 50).astype(float)
    hot[0, 0, 0] += 1  # 0.25% of all tokens more than the others have
    assert (
        follow(hot, CapacityConfig(local_factor=9.0, remote_factor=9.0))[0]
        == follow(load(50, 50), CapacityConfig(local_factor=9.0, remote_factor=9.0))[0]
    )


@given(
    st.lists(st.integers(0, 500), min_size=16, max_size=16).filter(any),
    st.floats(0.1, 8),
    st.floats(0.1, 8),
)
def test_what_the_counts_need_fits(counts, local, remote):
    """The same counts, spread evenly over a node's ranks, would have lost at most 0.5% on either
    side.
    """
    load_LNE = np.array(counts, dtype=np.int64).reshape(1, 2, 8)
    factors = follow(load_LNE, CapacityConfig(local_factor=local, remote_factor=remote))
    tokens_of_a_rank = load_LNE.sum() / TOPOLOGY.num_ranks
    for factor, pairs_NE in zip(factors, (LOCAL_NE, ~LOCAL_NE)):
        slots = factor * tokens_of_a_rank / TOPOLOGY.num_experts
        lost = (
            np.maximum(load_LNE[0][pairs_NE] / TOPOLOGY.ranks_per_node - slots, 0).sum()
            * TOPOLOGY.ranks_per_node
        )
        assert lost <= DROPS * load_LNE.sum() * (1 + 1e-9)
