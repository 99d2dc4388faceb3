"""The cost of a placement against a plain loop, ours against brute force, EPLB and standing
still.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.placement import Costs, evaluate, place_by_locality, rebalance
from pangu_locmoe.expert_load.placement.costs import holdings


def plain_seconds(expert_of_slot_P, load_NE, ranks, costs, held_RE) -> float:
    """The objective as costs.py states it, token by token's way."""
    nodes, experts = load_NE.shape
    rank_of = [slot * ranks // len(expert_of_slot_P) for slot in range(len(expert_of_slot_P))]
    node_of = [rank * nodes // ranks for rank in rank_of]
    load_R = np.zeros(ranks)
    in_N = np.zeros(nodes)
    out_N = np.zeros(nodes)
    for node, expert in itertools.product(range(nodes), range(experts)):
        copies = [slot for slot in range(len(expert_of_slot_P)) if expert_of_slot_P[slot] == expert]
        near = [slot for slot in copies if node_of[slot] == node] or copies
        for slot in near:
            load_R[rank_of[slot]] += load_NE[node, expert] / len(near)
            if node_of[slot] != node:
                in_N[node_of[slot]] += load_NE[node, expert] / len(near)
                out_N[node] += load_NE[node, expert] / len(near)
    moved = len(
        {
            (rank_of[slot], expert)
            for slot, expert in enumerate(expert_of_slot_P)
            if not held_RE[rank_of[slot], expert]
        }
    )
    return (
        costs.token_seconds * load_R.max()
        + costs.row_seconds * max(in_N.max(), out_N.max())
        + costs.move_seconds * moved
    )


def random_case(seed: int, layers: int = 1, nodes: int = 2, experts: int = 6, slots: int = 8):
    """Load [L, N, E], costs, a current placement [L, S]: skewed, local or not, moves free or
    dear.
    """
    random = np.random.default_rng(seed)
    load_LNE = (
        100
        * random.gamma(random.uniform(0.2, 3), 1, (layers, 1, experts))
        * random.gamma(random.uniform(0.2, 3), 1, (layers, nodes, experts))
    )
    costs = Costs(
        random.uniform(0, 1),
        random.uniform(0, 1),
        random.choice([0.0, random.uniform(0, 50)]),
        4.0,
        int(random.integers(1, 5)),
    )
    current = [
        random.permutation(np.r_[np.arange(experts), random.integers(0, experts, slots - experts)])
        for _ in range(layers)
    ]
    return load_LNE, costs, np.array(current)


def seconds(expert_of_slot_LP, load_LNE, ranks, costs, current_LP) -> np.ndarray:
    return evaluate(
        expert_of_slot_LP, load_LNE, ranks, costs, holdings(current_LP, ranks, load_LNE.shape[2])
    ).seconds_L


@pytest.mark.parametrize("seed", range(20))
def test_the_objective_is_what_it_says(seed):
    load_LNE, costs, current_LP = random_case(seed, layers=3)
    expert_of_slot_LP = random_case(seed + 100, layers=3)[2]
    held_LRE = holdings(current_LP, 4, 6)
    expected = [
        plain_seconds(expert_of_slot_LP[layer], load_LNE[layer], 4, costs, held_LRE[layer])
        for layer in range(3)
    ]
    result = evaluate(expert_of_slot_LP, load_LNE, 4, costs, held_LRE)
    np.testing.assert_allclose(result.seconds_L, expected, rtol=1e-12)
    np.testing.assert_allclose(result.load_LR.sum(axis=1), load_LNE.sum(axis=(1, 2)))
    np.testing.assert_allclose(result.in_LN.sum(axis=1), result.out_LN.sum(axis=1), atol=1e-9)


def all_placements(experts: int, ranks: int, slots: int) -> np.ndarray:
    """Every placement but for the order inside a rank, int64 [I, P]."""
    pick = itertools.combinations if slots == experts else itertools.combinations_with_replacement
    contents_XP = np.array(list(pick(range(experts), slots // ranks)))
    of_rank_X = np.bitwise_or.reduce(1 << contents_XP, axis=1)
    present_I = of_rank_X
    for _ in range(ranks - 1):
        present_I = (present_I[:, None] | of_rank_X).ravel()
    chosen_I = np.flatnonzero(present_I == (1 << experts) - 1)
    return contents_XP[
        np.stack(np.unravel_index(chosen_I, (len(contents_XP),) * ranks), axis=1)
    ].reshape(-1, slots)


# 20 random cases of 10 layers each: 200 instances, of every layer of which the optimum is known.
SIZES = [(4, 4)] * 2 + [(8, 8)] * 7 + [(4, 8)] * 5 + [(5, 8)] * 5 + [(6, 8)] * 1


def test_within_five_percent_of_the_optimum():
    every_placement = {
        (experts, slots): all_placements(experts, 4, slots) for experts, slots in set(SIZES)
    }
    ratios = []
    for seed, (experts, slots) in enumerate(SIZES):
        load_LNE, costs, current_LP = random_case(seed, 10, experts=experts, slots=slots)
        ours_L = seconds(
            place_by_locality(load_LNE, 4, current_LP, costs), load_LNE, 4, costs, current_LP
        )
        slots_IP = every_placement[experts, slots]
        for layer in range(10):
            load_INE, current_IP = (
                np.broadcast_to(array[layer], (len(slots_IP), *array.shape[1:]))
                for array in (load_LNE, current_LP)
            )
            ratios.append(ours_L[layer] / seconds(slots_IP, load_INE, 4, costs, current_IP).min())
    print(
        f"worst {max(ratios):.4f}, optimal {np.mean(np.array(ratios) < 1 + 1e-6):.1%} of "
        f"{len(ratios)}"
    )
    assert len(ratios) == 200
    assert min(ratios) > 1 - 1e-9
    assert max(ratios) <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "ranks"), [(8, 64), (4, 16)])
def test_24_layers_of_64_experts_take_a_tenth_of_a_second(nodes, ranks):
    load_LNE, _, _ = random_case(0, 24, nodes, 64, 64)
    current_LP = np.tile(np.arange(64), (24, 1))
    times = []
    for _ in range(5):
        start = time.process_time()
        place_by_locality(load_LNE, ranks, current_LP, Costs.of_model())
        times.append(time.process_time() - start)
    print(f"{1e3 * min(times):.0f} ms")
    assert min(times) < 0.1


SHAPES = st.sampled_from(
    [(2, 4, 8, 8), (2, 4, 6, 8), (1, 4, 8, 8), (4, 4, 8, 12), (2, 2, 6, 6), (1, 1, 3, 3)]
)


@given(st.integers(0, 10**6), SHAPES)
@settings(max_examples=25, deadline=None)
def test_never_worse_than_standing_still_or_eplb(seed, shape):
    nodes, ranks, experts, slots = shape
    load_LNE, costs, current_LP = random_case(seed, 2, nodes, experts, slots)
    expert_of_slot_LP = place_by_locality(load_LNE, ranks, current_LP, costs)
    assert expert_of_slot_LP.shape == (2, slots)
    assert all(
        set(expert_of_slot_P) == set(range(experts)) for expert_of_slot_P in expert_of_slot_LP
    )
    ours_L = seconds(expert_of_slot_LP, load_LNE, ranks, costs, current_LP)
    for other_LP in (current_LP, rebalance(load_LNE.sum(axis=1), slots, 1, nodes, ranks)[0]):
        assert (ours_L <= seconds(other_LP, load_LNE, ranks, costs, current_LP) * (1 + 1e-8)).all()
    stays_L = (expert_of_slot_LP == current_LP).all(axis=1)
    assert (stays_L | (ours_L < seconds(current_LP, load_LNE, ranks, costs, current_LP))).all()


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_nodes_have_no_names(seed):
    """Renaming the nodes, in the load and in the placement, changes no cost."""
    load_LNE, costs, current_LP = random_case(seed, 2, 4, 8, 12)
    node_N = np.random.default_rng(seed).permutation(4)
    expert_of_slot_LP = random_case(seed + 1, 2, 4, 8, 12)[2]
    renamed_LP, renamed_current_LP = (
        array.reshape(2, 4, 3)[:, node_N].reshape(2, 12)
        for array in (expert_of_slot_LP, current_LP)
    )
    np.testing.assert_allclose(
        seconds(renamed_LP, load_LNE[:, node_N], 4, costs, renamed_current_LP),
        seconds(expert_of_slot_LP, load_LNE, 4, costs, current_LP),
        rtol=1e-12,
    )


def test_no_gain_keeps_the_place():
    """An even load from everywhere: nothing is better than anything, so nothing moves, even for
    free.
    """
    current_LP = np.random.default_rng(0).permutation(16)[None]
    expert_of_slot_LP = place_by_locality(np.ones((1, 2, 16)), 8, current_LP, Costs(1, 1, 0, 1, 1))
    np.testing.assert_array_equal(expert_of_slot_LP, current_LP)


def test_dear_moves_keep_the_place():
    load_LNE, _, current_LP = random_case(3, 2, 2, 8, 8)
    np.testing.assert_array_equal(
        place_by_locality(load_LNE, 4, current_LP, Costs(1, 1, 1e9, 1, 1)), current_LP
    )


@pytest.mark.parametrize(("experts", "slots", "groups"), [(8, 8, 4), (8, 12, 2), (8, 16, 4)])
def test_groups_stay_within_a_node(experts, slots, groups):
    for seed in range(10):
        load_LNE, costs, current_LP = random_case(seed, 2, 2, experts, slots)
        for expert_of_slot_P in place_by_locality(
            load_LNE, 4, current_LP, costs, num_expert_groups=groups
        ):
            for group in range(groups):
                assert (
                    len(
                        {
                            slot * 2 // slots
                            for slot in np.flatnonzero(
                                expert_of_slot_P // (experts // groups) == group
                            )
                        }
                    )
                    == 1
                )


def test_groups_that_nodes_do_not_divide_are_refused():
    load_LNE, costs, current_LP = random_case(0, 1, 2, 6, 8)
    with pytest.raises(DataError, match=r"groups \(3\) must be divisible by nodes \(2\)"):
        place_by_locality(load_LNE, 4, current_LP, costs, num_expert_groups=3)


def test_prices_are_checked():
    with pytest.raises(DataError, match="horizon"):
        Costs.of_model(horizon=0)
    with pytest.raises(DataError, match="link bytes per second"):
        Costs.of_model(link_bytes_per_second=0)
    with pytest.raises(DataError, match="hidden size"):
        Costs.of_model(hidden_size=0)
    costs = Costs.of_model(
        hidden_size=100, ffn_size=200, flops_per_second=1e9, link_bytes_per_second=1e6, horizon=10
    )
    assert (costs.token_seconds, costs.row_seconds, costs.move_seconds) == pytest.approx(
        (12 * 20000 / 1e9, 4 * 200 / 1e6, 40000 * 12 / 1e6 / 10)
    )
