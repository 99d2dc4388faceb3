"""Which job this process belongs to."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Optional

from pangu_locmoe.config import Config
from pangu_locmoe.parallel.communicator import Communicator, SingleProcess
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.tensor import TensorGroup
from pangu_locmoe.parallel.topology import Topology


@dataclass(frozen=True)
class World:
    """This process's place: the way to the others, who holds what, the exchange and who shares
    its matrices (None in a single process).
    """

    communicator: Communicator
    topology: Topology
    exchange: Optional[Exchange] = None
    tensor: Optional[TensorGroup] = None

    @classmethod
    def of(cls, config: Config, communicator: Optional[Communicator] = None) -> World:
        """Raises TopologyError where the job's size does not fit the configuration."""
        communicator = communicator or SingleProcess()
        topology = Topology.from_config(config, communicator.size)
        if communicator.size == 1:
            return cls(communicator, topology)
        group = topology.expert_group(communicator.rank)
        nodes = [topology.node_of_rank(rank) for rank in group]
        tensor_ranks = topology.tensor_group(communicator.rank)
        exchange = Exchange(
            communicator,
            group,
            nodes,
            config.parallel.exchange == "hierarchical",
            tensor_ranks if config.parallel.exchange == "groupwise" else (),
        )
        return cls(
            communicator,
            topology,
            exchange,
            TensorGroup(communicator, tensor_ranks, config.parallel.sequence_parallel),
        )

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.communicator.rank == 0


def join() -> Communicator:
    """Join the job if msrun started this process, else be a world of one.

    Nothing may have a side effect before: msrun's scheduler runs the same program up to here and
    ends here.
    """
    if "MS_ROLE" not in os.environ:
        return SingleProcess()
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # as in whatever a script starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if (
        os.environ["MS_ROLE"] == "MS_WORKER"
    ):  # scripts/explain_job.py finds a dead process's rank by this line
        print(f"[INFO] rank {os.environ.get('RANK_ID', '?')} is process {os.getpid()}", flush=True)
    if os.environ.get("PANGU_LOCMOE_DEVICE") == "Ascend":  # scripts/train_ascend.sh
        from pangu_locmoe.parallel.hccl import HCCL

        return HCCL()
    from pangu_locmoe.parallel.mccl import MCCL

    return MCCL()
