"""Sequences of alike content share a node, and nothing else about the order changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pangu_locmoe.data.contents import contents_of, deal, nodes_by_content
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.data.sampler import BatchSampler
from pangu_locmoe.errors import DataError


@given(sizes=st.lists(st.integers(0, 100), min_size=1, max_size=30), nodes=st.integers(1, 6))
def test_dealing_is_balanced_to_the_largest_content(sizes, nodes):
    filled = np.bincount(deal(sizes, nodes), weights=sizes, minlength=nodes)
    assert filled.sum() == sum(sizes)
    assert filled.max() - filled.min() <= max(sizes)


def test_contents_do_not_mix_two_languages(make_config, corpus):
    prepared = prepare(make_config(sources=[(corpus, "text")]), progress=False)
    (contents,) = contents_of(prepared, 4, seed=1)
    np.testing.assert_array_equal(contents_of(prepared, 4, seed=1)[0], contents)
    rows = prepared.sequences("train", 0, range(len(contents)))
    texts = [prepared.tokenizer.decode(row.tolist()) for row in rows]
    chinese = np.array(
        [sum("\u4e00" <= c <= "\u9fff" for c in text) > len(text) / 3 for text in texts]
    )
    assert 0.2 < chinese.mean() < 0.8
    for content in np.unique(contents):
        share = chinese[contents == content].mean()
        assert min(share, 1 - share) < 0.05


def test_every_sequence_gets_a_node(make_config, corpus):
    prepared = prepare(make_config(), progress=False)
    nodes = nodes_by_content(prepared, 2, seed=1)
    assert [len(part) for part in nodes] == prepared.num_sequences["train"]
    assert set(np.concatenate(nodes)) == {0, 1}


def test_content_sharding_changes_the_order_in_a_batch_only():
    homes = [np.arange(30) % 2, np.zeros(10, int)]
    plain = BatchSampler([30, 10], 8, seed=1)
    sharded = BatchSampler([30, 10], 8, seed=1, nodes=2, sharding="content", home_of_sequence=homes)
    seen = []
    for _ in range(5):
        expected = next(plain)
        batch = next(sharded)
        assert sorted(expected) == sorted(batch)
        at_home = [homes[domain][sequence] for domain, sequence in batch]
        for node in (0, 1):
            block = at_home[node * 4 : node * 4 + 4]
            assert block.count(node) == min(4, at_home.count(node))
        seen += batch
    assert sorted(seen) == [(0, n) for n in range(30)] + [(1, n) for n in range(10)]


def test_homes_and_content_sharding_go_together():
    with pytest.raises(DataError, match="a home for each sequence"):
        BatchSampler([9], 4, nodes=2, sharding="content")
    with pytest.raises(DataError, match="only it does"):
        BatchSampler([9], 4, nodes=2, home_of_sequence=[np.zeros(9, int)])
