"""What the exchanges of a step with constant sizes send: from the topology and the configuration
alone.
"""

from __future__ import annotations

from typing import Iterator

from pangu_locmoe.config import Config
from pangu_locmoe.config.routers import top_k
from pangu_locmoe.moe.slot_sizes import group_slots
from pangu_locmoe.parallel.exchange import Ledger
from pangu_locmoe.parallel.hccl import group_name
from pangu_locmoe.parallel.operation import IR_NAMES, Operation, node_bytes, topology_groups
from pangu_locmoe.parallel.topology import Topology


def exchanges(config: Config, topology: Topology, rank: int) -> Iterator[Operation]:
    """Rows to the experts and back; the gradient takes the same ways in the other direction.

    Groupwise, a replica gathers its portions.
    """
    tokens = config.micro_batch * config.model.seq_length // topology.num_replicas
    group = topology.expert_group(rank)
    features = config.model.hidden_size
    size = len(group)
    position = group.index(rank)
    chunks = config.parallel.overlap_chunks
    rows_RR = (
        (group_slots(config.moe.capacity, topology, rank, tokens, top_k(config)) // chunks)
        .reshape(size, size, -1)
        .sum(axis=2)
    )
    carriers = topology.tensor_group(rank) if config.parallel.exchange == "groupwise" else (rank,)
    dtype = IR_NAMES[config.train.precision]
    name = group_name(group, topology.num_ranks)
    gathering = group_name(carriers, topology.num_ranks)
    for direction in ("forward", "backward"):
        for matrix_RR in (rows_RR, rows_RR.T):
            portion_RR = matrix_RR // len(carriers)  # a replica divides its slots evenly
            sent = portion_RR[position]
            arrived = int(portion_RR[:, position].sum())
            move = Operation(
                "AlltoAllV",
                name,
                direction,
                dtype,
                (int(sent.sum()) * features,),
                (arrived * features,),
                tuple(sent.tolist()),
            )
            yield from [move] * config.model.num_moe_layers * chunks
            if len(carriers) > 1:
                gather = Operation(
                    "AllGather",
                    gathering,
                    direction,
                    dtype,
                    (arrived, features),
                    (arrived * len(carriers), features),
                )
                yield from [gather] * config.model.num_moe_layers * chunks


def planned_traffic(config: Config, topology: Topology) -> Ledger:
    """What all ranks send in the exchanges of one step.

    Constant sizes: known without looking. Seconds are not.
    """
    ledger = Ledger()
    passes = config.train.accumulation_steps
    for rank in range(topology.num_ranks):
        groups = topology_groups(topology, rank)
        for operation in exchanges(config, topology, rank):
            group = groups[operation.group]
            inside, between = node_bytes(operation, group, topology, rank)
            ledger.intra_node_bytes += passes * inside
            ledger.inter_node_bytes += passes * between
            crossing = sum(
                topology.node_of_rank(other) != topology.node_of_rank(rank) for other in group
            )
            ledger.inter_node_messages += passes * crossing
            ledger.intra_node_messages += passes * (len(group) - 1 - crossing)
    return ledger
