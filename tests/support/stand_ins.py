"""HCCL's operators for CPU processes, so that the compiled step of an Ascend job can run: all of
them made of MCCL's AllReduce.

`install` puts them where `mindspore.ops` has its own; they are what the documentation says of
those, gradients included. Primitives made beforehand: some functions of `mindspore.ops` make theirs
when they are called, which fails in a cell's own `bprop`.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, create_group

from pangu_locmoe.parallel import hccl

MOST_ROWS = 64  # from one rank to another: every message has the room of the largest
GROUPS: dict[str, tuple[int, ...]] = {}
RANK = [0]


class _Everyones(nn.Cell):
    """A vector of every rank of a group, [R, M]: the sum of matrices with one row that is not
    zero.
    """

    def __init__(self, group: str) -> None:
        super().__init__()
        self.position = GROUPS[group].index(RANK[0])
        self.size = len(GROUPS[group])
        self.stack = ops.Stack()
        self.sum = ops.AllReduce(ops.ReduceOp.SUM, group)

    def construct(self, x_M: Tensor) -> Tensor:
        rows = []
        for position in range(self.size):
            rows.append(x_M if position == self.position else ops.zeros_like(x_M))
        return self.sum(self.stack(rows))


class AllGather(nn.Cell):
    def __init__(self, group: str) -> None:
        super().__init__()
        self.everyones = _Everyones(group)

    def construct(self, x: Tensor) -> Tensor:
        return ops.reshape(
            self.everyones(ops.reshape(x, (-1,))), (self.everyones.size * x.shape[0], *x.shape[1:])
        )


class ReduceScatter(nn.Cell):
    def __init__(self, op: str, group: str) -> None:
        super().__init__()
        self.position = GROUPS[group].index(RANK[0])
        self.size = len(GROUPS[group])
        self.sum = ops.AllReduce(op, group)

    def construct(self, x: Tensor) -> Tensor:
        share = x.shape[0] // self.size
        return self.sum(x)[self.position * share : (self.position + 1) * share]


class AlltoAllV(nn.Cell):
    def __init__(self, group: str, block_size: int) -> None:
        super().__init__()
        self.everyones = _Everyones(group)
        self.block = block_size
        self.room = MOST_ROWS * block_size
        self.concat = ops.Concat()
        self.zeros = ops.Zeros()

    def construct(self, flat: Tensor, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
        messages = []
        begin = 0
        for rows in sent:
            messages.append(flat[begin * self.block : (begin + rows) * self.block])
            messages.append(self.zeros((self.room - rows * self.block,), flat.dtype))
            begin = begin + rows
        everyones = self.everyones(self.concat(messages))
        mine = self.everyones.position * self.room
        arrived = []
        for source in range(self.everyones.size):
            arrived.append(everyones[source, mine : mine + received[source] * self.block])
        return self.concat(arrived)


def install(rank: int, size: int) -> hccl.HcclOperators:
    """This rank's communicator; every rank of a group has something to send to every other."""
    RANK[0] = rank
    hccl.HCCL_WORLD_COMM_GROUP = GlobalComm.WORLD_COMM_GROUP
    GROUPS[GlobalComm.WORLD_COMM_GROUP] = tuple(range(size))
    for operator in (AllGather, ReduceScatter, AlltoAllV):
        setattr(hccl.ops, operator.__name__, operator)

    def create(name: str, ranks: list[int]) -> None:
        GROUPS[name] = tuple(ranks)
        create_group(name, ranks)

    return hccl.HcclOperators(rank, size, create)
