"""Several processes on Ascend devices, over HCCL. Started by msrun.

The communicator's methods run in PyNative, with sizes that follow the routing. The cells below are
the same operators for a compiled graph, with sizes that are constants. A group costs twice
HCCL_BUFFSIZE of device memory on each member, so a rank makes few: the world, its expert-parallel
group, the replicas of its experts, with tensor parallelism its tensor-parallel group and the ranks
with the same part of the matrices, and those of the reduction by node (`Topology.groups`).

None of this has run on a device: what is handed to the operators is tested, what they do with it is
their documentation's.

Letters: R ranks, M rows, D features.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Callable, Dict, List, Sequence, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Zero
from mindspore.communication import (
    HCCL_WORLD_COMM_GROUP,
    create_group,
    get_group_size,
    get_rank,
    init,
)

from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.exchange import portions

CreateGroup = Callable[[str, List[int]], Any]


class HcclOperators(Communicator):
    """The operators of one rank, apart from joining a job, so that a configuration can be checked
    without one.

    Args:
        rank: this process.
        size: processes of the job.
        create: makes a group of a name and its ranks; called once for each group, by its members
            only.
    """

    def __init__(self, rank: int, size: int, create: CreateGroup) -> None:
        self.rank = rank
        self.size = size
        self.groups: Dict[str, Tuple[int, ...]] = {}
        self._create = create
        self._operators: Dict[Tuple[Any, ...], Any] = {}

    def group(self, ranks: Sequence[int]) -> str:
        """The name of a group, which is made when it is first asked for."""
        members = tuple(ranks)
        if self.rank not in members:
            raise ValueError(f"rank {self.rank} is no member of {members}")
        name = group_name(members, self.size)
        if name not in self.groups:
            if name != HCCL_WORLD_COMM_GROUP:
                self._create(name, list(members))
            self.groups[name] = members
        return name

    def all_reduce(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        if len(ranks) == 1:
            return x
        return self.summing(ranks)(x)

    def summing(self, ranks: Sequence[int]) -> Callable[[Tensor], Tensor]:
        group = self.group(ranks)
        operator: Callable[[Tensor], Tensor] = self._operator(
            ("sum", group), lambda: ops.AllReduce(ops.ReduceOp.SUM, group)
        )
        return operator

    def gathering(self, ranks: Sequence[int]) -> Callable[[Tensor], Tensor]:
        group = self.group(ranks)
        operator: Callable[[Tensor], Tensor] = self._operator(
            ("gather", group), lambda: ops.AllGather(group)
        )
        return operator

    def scattering(self, ranks: Sequence[int]) -> Callable[[Tensor], Tensor]:
        group = self.group(ranks)
        operator: Callable[[Tensor], Tensor] = self._operator(
            ("scatter", group), lambda: ops.ReduceScatter(ops.ReduceOp.SUM, group)
        )
        return operator

    def reduce_scatter(self, rows_MX: Tensor, ranks: Sequence[int]) -> Tensor:
        return rows_MX if len(ranks) == 1 else self.scattering(ranks)(rows_MX)

    def gather_rows(self, rows_MX: Tensor, ranks: Sequence[int]) -> Tensor:
        return rows_MX if len(ranks) == 1 else self.gathering(ranks)(rows_MX)

    def all_gather(self, x: Tensor) -> Tensor:
        group = self.group(range(self.size))
        gathered = self._operator(("gather", group), lambda: ops.AllGather(group))(
            ops.reshape(x, (1, -1))
        )
        return ops.reshape(gathered, (self.size, *x.shape))

    def all_to_all(
        self, rows_MD: Tensor, sent: Sequence[int], received: Sequence[int], ranks: Sequence[int]
    ) -> Tensor:
        if len(ranks) == 1:
            return rows_MD
        features = rows_MD.shape[1:]
        if sum(sent) == 0:
            # A rank with nothing to send must still take part; one row that no count covers stands
            # for an empty tensor.
            rows_MD = ops.zeros((1, *features), rows_MD.dtype)
        group = self.group(ranks)
        block = int(np.prod(features))
        exchange = self._operator(("rows", group, block), lambda: ops.AlltoAllV(group, block))
        arrived = exchange(ops.reshape(rows_MD, (-1,)), list(sent), list(received))
        if sum(received) == 0:  # the operator's result has no meaning then
            return Tensor(shape=(0, *features), dtype=rows_MD.dtype, init=Zero())
        return ops.reshape(arrived, (sum(received), *features))

    def barrier(self) -> None:
        self.all_reduce(ops.ones((1,), ms.float32), range(self.size)).asnumpy()

    def _operator(self, key: Tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._operators:
            self._operators[key] = make()
        return self._operators[key]


class HCCL(HcclOperators):
    """Joins the job that msrun started; HCCL_DETERMINISTIC=true asks for the same numbers in
    every run, more slowly.
    """

    def __init__(self) -> None:
        ms.set_device("Ascend")
        if os.environ.get("HCCL_DETERMINISTIC", "").lower() == "true":
            ms.set_deterministic(True)
        init("hccl")
        super().__init__(get_rank(), get_group_size(), create_group)


def group_name(ranks: Sequence[int], size: int) -> str:
    """The same on all members, different for different ranks, and short: HCCL takes names of up
    to 127 characters.
    """
    if tuple(ranks) == tuple(range(size)):
        return HCCL_WORLD_COMM_GROUP
    steps = set(np.diff(ranks).tolist())
    if len(steps) == 1:
        return f"ranks-{ranks[0]}-to-{ranks[-1]}-by-{steps.pop()}"
    return "ranks-" + hashlib.sha256(",".join(map(str, ranks)).encode()).hexdigest()[:32]


class AllToAllRows(nn.Cell):
    """Rows sorted by destination -> rows sorted by source, with constant counts; the operator has
    its own gradient.

    Args:
        group: name of the group.
        features: D.
        sent, received: rows to and from each rank of the group.
    """

    def __init__(
        self, group: str, features: int, sent: Sequence[int], received: Sequence[int]
    ) -> None:
        super().__init__()
        self.exchange = ops.AlltoAllV(group, features)
        self.features = features
        self.total = int(sum(received))
        self.sent = tuple(map(int, sent))
        self.received = tuple(map(int, received))

    def construct(self, rows_MD: Tensor) -> Tensor:
        return self.arrive(self.depart(rows_MD))

    def depart(self, rows_MD: Tensor) -> Tensor:
        """Rows under way: whatever uses them, `arrive` too, waits for the exchange."""
        return self.exchange(ops.reshape(rows_MD, (-1,)), self.sent, self.received)

    def arrive(self, flat: Tensor) -> Tensor:
        """The rows of what `depart` returned."""
        return ops.reshape(flat, (self.total, self.features))


class GroupwiseRows(nn.Cell):
    """`AllToAllRows` shared out over the ranks of a replica, which have the same rows (groupwise):
    each carries an equal portion.

    Args:
        group: name of the expert-parallel group.
        carriers: name of the tensor-parallel group.
        features: D.
        matrix_RR: rows from each rank of the group to each.
        position: this rank's in the group.
        own, count: this rank's position among the carriers, and how many they are; must divide
            every entry of `matrix_RR`.
    """

    def __init__(
        self,
        group: str,
        carriers: str,
        features: int,
        matrix_RR: np.ndarray,
        position: int,
        own: int,
        count: int,
    ) -> None:
        super().__init__()
        self.there = _GroupwiseWay(group, carriers, features, matrix_RR, position, own, count)
        self.back = _GroupwiseWay(group, carriers, features, matrix_RR.T, position, own, count)

    def construct(self, rows_MD: Tensor) -> Tensor:
        return self.there(rows_MD)

    def bprop(self, rows_MD: Tensor, out: Tensor, grad_MD: Tensor) -> Tuple[Tensor]:
        return (self.back(grad_MD),)


class _GroupwiseWay(nn.Cell):
    def __init__(
        self,
        group: str,
        carriers: str,
        features: int,
        matrix_RR: np.ndarray,
        position: int,
        own: int,
        count: int,
    ) -> None:
        super().__init__()
        carried, portions_XRR, order = portions(matrix_RR, position, own, count)
        self.exchange = AllToAllRows(
            group,
            features,
            portions_XRR[own, position].tolist(),
            portions_XRR[own, :, position].tolist(),
        )
        self.all_gather = ops.AllGather(carriers)
        self.gather = ops.Gather()
        self.carried = Tensor(carried.astype(np.int32))
        self.order = Tensor(order.astype(np.int32))

    def construct(self, rows_MD: Tensor) -> Tensor:
        arrived = self.exchange(self.gather(rows_MD, self.carried, 0))
        return self.gather(self.all_gather(arrived), self.order, 0)


class GatherRows(nn.Cell):
    """A vector of every rank of the group, [R, M]. No gradient is asked of it."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.gather = ops.AllGather(group)

    def construct(self, x_M: Tensor) -> Tensor:
        return self.gather(ops.expand_dims(x_M, 0))
