"""Several processes on CPUs, over MindSpore's own collectives (MCCL).

Started by msrun; PyNative only.

MCCL has no All-to-All. It is made of point-to-point messages here: all sends first, to rank+1, +2,
..., then all receives. Receivers buffer, so that it cannot deadlock. Messages and collectives share
one untagged queue per source, so no collective may come between a send and its receive.
"""

from __future__ import annotations

import os
from typing import Dict, Sequence, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Zero
from mindspore.communication import GlobalComm, create_group, get_group_size, get_rank, init
from mindspore.ops.auto_generate.gen_ops_prim import dist_comm_irecv_op, dist_comm_isend_op

from pangu_locmoe.errors import TopologyError
from pangu_locmoe.parallel.communicator import Communicator


class MCCL(Communicator):
    """Joins the job that msrun started."""

    def __init__(self) -> None:
        ms.set_device("CPU")
        try:
            init()
        except RuntimeError:
            raise TopologyError(_cannot_join()) from None
        # Errors of asynchronous operators would surface at a later one; small exchanges are also
        # five times faster.
        ms.runtime.launch_blocking()
        self.rank = get_rank()
        self.size = get_group_size()
        self._world = GlobalComm.WORLD_COMM_GROUP
        self._reducers: Dict[Tuple[int, ...], ops.AllReduce] = {}
        self._gather = ops.AllGather()

    def all_reduce(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        if len(ranks) == 1:
            return x
        return self.summing(ranks)(x)

    def summing(self, ranks: Sequence[int]) -> ops.AllReduce:
        members = tuple(ranks)
        if members not in self._reducers:
            group = self._world
            if len(members) < self.size:
                group = "ranks-" + "-".join(map(str, members))
                create_group(group, list(members))
            self._reducers[members] = ops.AllReduce(ops.ReduceOp.SUM, group)
        return self._reducers[members]

    def all_gather(self, x: Tensor) -> Tensor:
        return ops.reshape(self._gather(ops.reshape(x, (1, -1))), (self.size, *x.shape))

    def all_to_all(
        self, rows_MD: Tensor, sent: Sequence[int], received: Sequence[int], ranks: Sequence[int]
    ) -> Tensor:
        position = list(ranks).index(self.rank)
        count = len(ranks)
        ends = np.cumsum(sent).tolist()
        # Messages without rows are skipped on both sides; empty tensors have no kernels.
        for distance in range(1, count):
            target = (position + distance) % count
            if sent[target]:
                dist_comm_isend_op(
                    rows_MD[ends[target] - sent[target] : ends[target]],
                    ranks[target],
                    self._world,
                    0,
                )
        arrived: Dict[int, Tensor] = {}
        if received[position]:
            arrived[position] = rows_MD[ends[position] - sent[position] : ends[position]]
        for distance in range(1, count):
            source = (position - distance) % count
            if received[source]:
                arrived[source] = ops.zeros((received[source], *rows_MD.shape[1:]), rows_MD.dtype)
                dist_comm_irecv_op(arrived[source], 0, ranks[source], self._world)
        if not arrived:
            return Tensor(shape=(0, *rows_MD.shape[1:]), dtype=rows_MD.dtype, init=Zero())
        return ops.concat([arrived[source] for source in sorted(arrived)], 0)

    def barrier(self) -> None:
        self.all_reduce(ops.ones((1,), ms.float32), range(self.size)).asnumpy()


def _cannot_join() -> str:
    """One line on why a job did not come together; msrun's variables say which job."""
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        return "msrun's scheduler: a rank did not start, or ended with an error"
    job = {
        name: os.environ.get(f"MS_{name}", "?")
        for name in ("WORKER_NUM", "SCHED_HOST", "SCHED_PORT", "TOPO_TIMEOUT")
    }
    return (
        f"rank {os.environ.get('RANK_ID', '?')} cannot join the job of {job['WORKER_NUM']} "
        f"processes at {job['SCHED_HOST']}:{job['SCHED_PORT']}: "
        f"another rank did not start within {job['TOPO_TIMEOUT']} s, or another program "
        "uses the port"
    )
