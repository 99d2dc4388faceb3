"""Before anything expensive: are all ranks of the job here, do they run the same thing, and do
their collectives work?

A wrong sum or exchange would train a wrong model without a word; a missing rank would hang the
first step.

Letters: R ranks of a group, M rows.
"""

from __future__ import annotations

import hashlib
from typing import List, NoReturn, Sequence, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_locmoe import __version__
from pangu_locmoe.config import Config
from pangu_locmoe.errors import CheckpointError, ConfigError, TopologyError
from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.topology import Topology

_FEATURES = 3


def check_same_run(config: Config, communicator: Communicator, version: str = __version__) -> None:
    """Raises ConfigError on every rank, naming ranks, where configuration or version are not the
    same on all.
    """
    if communicator.size == 1:
        return
    own = np.concatenate([_digest(config.to_yaml()), _digest(version)])
    try:
        all_R = communicator.all_gather(Tensor(own)).asnumpy()
    except RuntimeError as error:
        _missing(communicator.rank, "AllGather", "the world", range(communicator.size), error)
    for what, part, advice in (
        ("configuration", all_R[:, :4], "start every node with the same file and --set"),
        ("version of pangu_locmoe", all_R[:, 4:], "install the same on every node"),
    ):
        other = np.flatnonzero((part != part[0]).any(axis=1)).tolist()
        if other:
            raise ConfigError(
                f"{_ranks(other)} {'has' if len(other) == 1 else 'have'} another {what} "
                f"than rank 0: {advice}"
            )


def check_same_step(step: int, communicator: Communicator) -> None:
    """Raises CheckpointError where the ranks found different checkpoints to continue from."""
    steps = communicator.all_gather(Tensor([step], ms.int32)).asnumpy()[:, 0]
    other = np.flatnonzero(steps != steps[0]).tolist()
    if other:
        raise CheckpointError(
            f"{_ranks(other)} would continue after step {steps[other[0]]}, rank 0 after "
            f"{steps[0]}: the run directory must be one that all nodes share"
        )


def check_groups(topology: Topology, communicator: Communicator) -> None:
    """An exchange and a sum with known results in every group of this rank.

    Raises:
        TopologyError: a result is wrong or a rank does not answer; names this rank, the group and a
            likely cause.
    """
    if communicator.size == 1:
        return
    rank = communicator.rank
    checked: List[Tuple[int, ...]] = []
    for name, ranks in topology.groups(rank).items():
        if ranks in checked or len(ranks) == 1:
            continue
        checked.append(ranks)
        try:
            _check_sum(name, ranks, communicator)
            counts_RR = exchange_counts(len(ranks))
            for matrix_RR in (counts_RR, counts_RR.T):
                _check_exchange(name, ranks, matrix_RR, communicator)
        except RuntimeError as error:
            _missing(rank, "exchange", name, ranks, error)


def _check_sum(name: str, ranks: Sequence[int], communicator: Communicator) -> None:
    weights = np.arange(1, 6, dtype=np.float32)
    got = communicator.all_reduce(
        Tensor(weights * (communicator.rank + 1), ms.float32), ranks
    ).asnumpy()
    wanted = weights * sum(rank + 1 for rank in ranks)
    if not np.array_equal(got, wanted):
        _wrong(
            communicator.rank,
            "AllReduce",
            name,
            ranks,
            f"the sum is {got[0]:g}, not {wanted[0]:g}",
            got,
        )


def _check_exchange(
    name: str, ranks: Sequence[int], matrix_RR: np.ndarray, communicator: Communicator
) -> None:
    position = list(ranks).index(communicator.rank)
    blocks = [
        _block(communicator.rank, target, count)
        for target, count in zip(ranks, matrix_RR[position])
    ]
    sent = matrix_RR[position].tolist()
    received = matrix_RR[:, position].tolist()
    got_MD = communicator.all_to_all(
        Tensor(np.concatenate(blocks)), sent, received, ranks
    ).asnumpy()
    if len(got_MD) != sum(received):
        _wrong(
            communicator.rank,
            "exchange",
            name,
            ranks,
            f"{len(got_MD)} rows came, not {sum(received)}",
            got_MD,
        )
    for source, rows_MD in zip(ranks, np.split(got_MD, np.cumsum(received)[:-1])):
        if not np.array_equal(rows_MD, _block(source, communicator.rank, len(rows_MD))):
            found = "zero" if not rows_MD.any() else "wrong"
            _wrong(
                communicator.rank,
                "exchange",
                name,
                ranks,
                f"the rows from rank {source} are {found}",
                rows_MD,
            )


def exchange_counts(size: int) -> np.ndarray:
    """How many rows each rank sends to each in the check: uneven, some none, int [R, R]."""
    source_R = np.arange(size)[:, None]
    target_R = np.arange(size)[None]
    return np.where(source_R == target_R, 1, (source_R + 2 * target_R + 3) % 4)


def _block(source: int, target: int, count: int) -> np.ndarray:
    """Rows [count, features] that say where they come from and where they go, none of them zero."""
    return (
        np.full((count, _FEATURES), 1.0 + source + target / 1024.0, np.float32)
        * np.arange(1, count + 1, dtype=np.float32)[:, None]
    )


def _wrong(
    rank: int, operation: str, name: str, ranks: Sequence[int], what: str, got: np.ndarray
) -> NoReturn:
    cause = "another job on the same port, or ranks that run different programs"
    if not got.any():
        cause = (
            "a collective library that returns zeros, as native AlltoAll does on some 910A "
            "stacks: update CANN"
        )
    raise TopologyError(
        f"rank {rank}: the {operation} in {name} ({_ranks(ranks)}) is wrong: {what}; "
        f"likely cause: {cause}"
    )


def _missing(
    rank: int, operation: str, name: str, ranks: Sequence[int], error: RuntimeError
) -> NoReturn:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    raise TopologyError(
        f"rank {rank}: the {operation} in {name} ({_ranks(ranks)}) failed: {said}; likely "
        "cause: one of these ranks ended or cannot be reached"
    ) from None


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _digest(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(text.encode("utf-8")).digest()[:16], np.int32).copy()
