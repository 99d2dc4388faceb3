"""Checkpoints of any layout of ranks are read by any other: experts, slices and moments come out
where they belong.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from mindspore import Tensor
from support import tiny

from pangu_locmoe.checkpoint import format as checkpoints
from pangu_locmoe.checkpoint.shards import Held
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.gradients import kind, pieces
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.optimizer import AdamW

# ranks, expert_parallel, tensor_parallel, shard_optimizer
LAYOUTS = [
    (1, 1, 1, False),
    (4, 4, 1, False),
    (4, 1, 2, False),
    (4, 2, 2, False),
    (4, 1, 4, False),
    (8, 2, 2, False),
    (4, 2, 1, True),
    (8, 2, 2, True),
]
ONE, FOUR, EIGHT, SHARDED = (LAYOUTS[number] for number in (0, 3, 5, 7))


class Rank(SingleProcess):
    """One rank of a job, a thread of this process."""

    def __init__(self, rank: int, said: list, everyone: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(said)
        self.said = said
        self.everyone = everyone

    def barrier(self) -> None:
        self.everyone.wait()

    def all_gather(self, x: Tensor) -> Tensor:
        self.said[self.rank] = x.asnumpy()
        self.everyone.wait()
        gathered = np.stack(self.said)
        self.everyone.wait()
        return Tensor(gathered)


def config(ranks, expert_parallel, tensor_parallel, shard_optimizer):
    parallel = {
        "expert_parallel": expert_parallel,
        "tensor_parallel": tensor_parallel,
        "shard_optimizer": shard_optimizer,
    }
    parallel = parallel if ranks > 1 else {}
    return tiny.tiny_config(
        model={"num_heads": 4, "vocab_size": 512, "domain_embeddings": True},
        moe={"router": "switch"},
        train={"batch_size": 8},
        parallel=parallel,
    )


def job(layout):
    """Config, worlds, models and optimizers of all ranks; their weights are those of one
    process.
    """
    settings = config(*layout)
    everyone = threading.Barrier(layout[0])
    said = [None] * layout[0]
    worlds = [World.of(settings, Rank(rank, said, everyone)) for rank in range(layout[0])]
    models = [
        PanguSigma(settings, None, world.topology, world.exchange, world.tensor) for world in worlds
    ]
    return (
        settings,
        worlds,
        models,
        [optimizer_of(settings, world, model) for world, model in zip(worlds, models)],
    )


def optimizer_of(settings, world, model):
    parameters = model.trainable_params()
    divided = settings.parallel.shard_optimizer
    return AdamW.of(
        parameters,
        settings.train,
        pieces(parameters, world.topology, world.communicator.rank) if divided else None,
    )


def own(parameter, piece):
    """What of a parameter a moment is for."""
    value = parameter.asnumpy().copy()
    return value if piece is None else piece.of(value)


def write(folder, layout):
    settings, worlds, models, optimizers = job(layout)
    for optimizer in optimizers:
        for parameter, piece, moment in zip(
            optimizer.parameters, optimizer.pieces, optimizer.moment_m
        ):
            moment.set_data(Tensor(own(parameter, piece)))

    def save(rank):
        checkpoints.save_checkpoint(
            folder, settings, None, models[rank], optimizers[rank], {"step": 1}, worlds[rank]
        )

    with ThreadPoolExecutor(len(worlds)) as threads:
        list(threads.map(save, range(len(worlds))))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of the same weights, and of first moments equal to them, by every layout."""
    made = {}
    for layout in LAYOUTS:
        made[layout] = tmp_path_factory.mktemp("layouts") / "step-00000001"
        write(made[layout], layout)
    return made


def test_every_layout_writes_the_same_arrays(folders):
    for part in ("model", "optimizer"):
        whole = checkpoints.read_shards(folders[ONE], part)
        for folder in folders.values():
            arrays = checkpoints.read_shards(folder, part)
            assert set(arrays) == set(whole)
            for name in whole:
                np.testing.assert_array_equal(arrays[name], whole[name], err_msg=name)


@pytest.mark.parametrize(
    "before, after",
    [pair for pair in itertools.permutations(LAYOUTS, 2) if pair[1] in (ONE, FOUR, EIGHT, SHARDED)],
    ids=str,
)
def test_any_layout_reads_any_other(folders, before, after):
    _, _, models, optimizers = job(after)
    wanted = [{p.name: p.asnumpy().copy() for p in model.get_parameters()} for model in models]
    for model, optimizer, expected in zip(models, optimizers, wanted):
        for parameter in model.get_parameters():
            parameter.set_data(parameter * 0)
        checkpoints.load_weights(folders[before], model)
        checkpoints.load_optimizer(folders[before], optimizer, Held.by(model))
        for parameter, piece, moment in zip(
            optimizer.parameters, optimizer.pieces, optimizer.moment_m
        ):
            np.testing.assert_array_equal(
                parameter.asnumpy(), expected[parameter.name], err_msg=parameter.name
            )
            np.testing.assert_array_equal(
                moment.asnumpy(), own(parameter, piece), err_msg=moment.name
            )


def test_a_rank_writes_its_share(folders):
    """Two replicas of two ranks: the files are as large as the shares are, and rank 0's has what
    is whole besides.
    """
    sizes = [
        (folders[FOUR] / checkpoints.shard_name("model", rank)).stat().st_size for rank in range(4)
    ]
    one = (folders[ONE] / "model.safetensors").stat().st_size
    assert sizes[2] == pytest.approx(sizes[3], rel=0.05) and sizes[2] < sizes[1] < sizes[0]
    assert sum(sizes) == pytest.approx(one, rel=0.1)


def test_sharded_moments_are_divided_by_the_ranks_that_hold_the_same(folders):
    """Two expert groups of two replicas of two ranks: experts' moments in halves, slices' in
    quarters, what is whole in eighths.
    """
    _, _, _, optimizers = job(SHARDED)
    for optimizer in optimizers:
        for parameter, moment in zip(optimizer.parameters, optimizer.moment_v):
            parts = {"whole": 8, "slice": 4, "expert": 2}[kind(parameter)]
            assert moment.size * parts == parameter.size, parameter.name
    sizes = [
        sum(array.nbytes for array in checkpoints.read_arrays(file).values())
        for file in (
            folders[SHARDED] / checkpoints.shard_name("optimizer", rank) for rank in range(8)
        )
    ]
    whole = checkpoints.read_arrays(folders[ONE] / "optimizer.safetensors")
    # Every number is in one file, and all files are alike.
    assert len(set(sizes)) == 1
    assert sum(sizes) == sum(array.nbytes for array in whole.values())
