"""Which sequences a process gets: the ranks of a job have together what a single process has, in
every micro-batch.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.small import small_config

from pangu_locmoe.data.loader import Batch
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.step.objective import micro_batches

LENGTH = 8


def batch(sequences: int) -> Batch:
    """Each token is the number of its sequence."""
    rows_BS = np.repeat(np.arange(sequences, dtype=np.int32)[:, None], LENGTH, axis=1)
    return Batch(
        rows_BS, rows_BS + 1, rows_BS + 2, rows_BS + 3, rows_BS[:, 0], np.ones(sequences, bool)
    )


def sequences_of(config, world) -> list[list[int]]:
    """Of each micro-batch."""
    found = []
    for tokens, targets, positions, segments, domains, keys, _ in micro_batches(
        batch(config.train.batch_size), 1, config, world
    ):
        for offset, tensor in enumerate((tokens, targets, positions, segments)):
            np.testing.assert_array_equal(tensor.asnumpy()[:, 0] - offset, domains.asnumpy())
        assert keys.shape == (tokens.size,)
        found.append(domains.asnumpy().tolist())
    return found


def test_a_single_process_takes_an_equal_share_of_each_nodes_run():
    config = small_config(train={"batch_size": 12, "accumulation_steps": 3}, parallel={"nodes": 2})
    assert sequences_of(config, World.of(config)) == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


@pytest.mark.parametrize("ranks, per_node, tensor", [(2, 1, 1), (4, 2, 1), (4, 4, 1), (8, 4, 2)])
def test_the_places_of_a_job_divide_what_a_single_process_has(ranks, per_node, tensor):
    train = {"batch_size": 16, "accumulation_steps": 2}
    alone = small_config(train=train, parallel={"nodes": ranks // per_node})
    wanted = sequences_of(alone, World.of(alone))
    topology = Topology(ranks, per_node, ranks // tensor, 8, tensor)
    config = small_config(train=train)
    ranks_have = [
        sequences_of(
            config,
            World(SimpleNamespace(rank=rank, size=ranks), topology, exchange=SimpleNamespace()),
        )
        for rank in range(ranks)
    ]
    for rank, own in enumerate(ranks_have):
        assert own == ranks_have[rank - rank % tensor], "the ranks of a replica have the same"
    for number, all_of_them in enumerate(wanted):
        assert [one for own in ranks_have[::tensor] for one in own[number]] == all_of_them


def test_randomness_belongs_to_tokens_and_not_to_processes():
    config = small_config(train={"batch_size": 4})
    topology = Topology(2, 1, 2, 4)
    (whole,) = micro_batches(batch(4), 7, config, World.of(config))
    for rank in range(2):
        world = World(SimpleNamespace(rank=rank, size=2), topology, exchange=SimpleNamespace())
        (own,) = micro_batches(batch(4), 7, config, world)
        np.testing.assert_array_equal(own[5].asnumpy(), whole[5].asnumpy().reshape(2, -1)[rank])
        np.testing.assert_array_equal(own[6].asnumpy(), whole[6].asnumpy())
