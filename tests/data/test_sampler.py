from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pangu_locmoe.data.sampler import BatchSampler
from pangu_locmoe.errors import DataError


def picks(sampler: BatchSampler, batches: int) -> list[tuple[int, int]]:
    return [pick for _ in range(batches) for pick in next(sampler)]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 3),
)
def test_every_sequence_once_per_epoch(sizes: list[int], seed: int, epochs: int) -> None:
    total = sum(sizes)
    got = picks(BatchSampler(sizes, 1, seed=seed), epochs * total)
    for epoch in range(epochs):
        assert len(set(got[epoch * total : (epoch + 1) * total])) == total


@given(weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=5), batches=st.integers(1, 40))
def test_proportions_are_exact(weights: list[float], batches: int) -> None:
    sampler = BatchSampler([7] * len(weights), 4, mixture=weights)
    taken = Counter(domain for domain, _ in picks(sampler, batches))
    for domain, weight in enumerate(weights):
        assert abs(taken[domain] - weight / sum(weights) * 4 * batches) < len(weights)


def test_a_share_of_zero_is_never_taken_and_a_small_domain_starts_again() -> None:
    got = picks(BatchSampler([100, 3, 100], 4, mixture=[0.5, 0.5, 0.0]), 6)
    assert Counter(domain for domain, _ in got) == {0: 12, 1: 12}
    small = [number for domain, number in got if domain == 1]
    assert Counter(small) == {0: 4, 1: 4, 2: 4}


@given(stop=st.integers(0, 30), sharding=st.sampled_from(["iid", "domain"]))
def test_resuming_continues_identically(stop: int, sharding: str) -> None:
    def make() -> BatchSampler:
        return BatchSampler([5, 11], 4, seed=3, nodes=2, sharding=sharding)

    first = make()
    second = make()
    picks(first, stop)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.batches == stop and picks(first, 10) == picks(second, 10)


def test_another_seed_another_order_and_a_foreign_state_is_refused() -> None:
    one = BatchSampler([50], 8, seed=1)
    two = BatchSampler([50], 8, seed=2)
    with pytest.raises(DataError, match="seed was 1, now it is 2"):
        two.load_state_dict(one.state_dict())
    assert picks(one, 5) != picks(two, 5)


def test_a_batch_is_shuffled() -> None:
    batches = [
        [domain for domain, _ in next(sampler)]
        for sampler in [BatchSampler([50, 50], 8, seed=1)]
        for _ in range(10)
    ]
    assert len({tuple(batch) for batch in batches}) > 5


@given(
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=4),
    nodes=st.sampled_from([2, 4]),
    data=st.data(),
)
def test_domain_sharding_fills_equal_blocks_with_own_domains_first(
    sizes: list[int], nodes: int, data: st.DataObject
) -> None:
    homes = data.draw(st.lists(st.integers(0, nodes - 1), min_size=len(sizes), max_size=len(sizes)))
    plain = BatchSampler(sizes, 8, seed=1)
    sharded = BatchSampler(sizes, 8, seed=1, nodes=nodes, sharding="domain", home_node=homes)
    for _ in range(5):
        expected = next(plain)
        batch = next(sharded)
        assert sorted(expected) == sorted(batch)
        share = 8 // nodes
        for node in range(nodes):
            block = batch[node * share : (node + 1) * share]
            own = sum(homes[domain] == node for domain, _ in block)
            assert own == min(share, sum(homes[domain] == node for domain, _ in batch))


def test_mixture_by_name_needs_the_names() -> None:
    by_name = BatchSampler([9, 9], 4, mixture={"zh": 1.0, "en": 3.0}, domains=["en", "zh"])
    assert Counter(domain for domain, _ in next(by_name)) == {0: 3, 1: 1}
    with pytest.raises(DataError, match="mixture"):
        BatchSampler([9, 9], 4, mixture={"zh": 1.0, "en": 3.0})


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="shared equally"):
        BatchSampler([9], 4, nodes=3)
    with pytest.raises(DataError, match="at least one sequence"):
        BatchSampler([9, 0], 4, mixture=[1, 1])
