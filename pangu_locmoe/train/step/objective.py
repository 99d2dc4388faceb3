"""What a step minimises, cross entropy plus the weighted router losses, and its micro-batches.

Letters: B batch, S sequence, T = B*S tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import numpy as np
from mindspore import Tensor, nn, ops

from pangu_locmoe.config import Config
from pangu_locmoe.data.loader import Batch
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.nn.noise import draw_keys
from pangu_locmoe.parallel.world import World

LOSSES = ("loss", "cross_entropy", "balance_loss", "locality_loss", "z_loss")


class Objective(nn.Cell):
    """Cross entropy plus the weighted router losses, times a loss scale.

    L = L_ce + alpha L_aux + mu L_loc (LocMoE).
    """

    def __init__(self, model: PanguSigma, config: Config, capacities: Tuple[int, ...]) -> None:
        super().__init__(auto_prefix=False)
        moe = config.moe
        self.model = model
        self.capacities = capacities
        self.balance = moe.balance_loss
        self.locality = config.locality_weight
        self.z = moe.z_loss

    def construct(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        domains_B: Tensor,
        row_keys_T: Tensor,
        column_keys_D: Tensor,
        scale: Tensor,
    ) -> Tuple[Tensor, Tensor, Dict[str, Tensor]]:
        """Returns the scaled loss, the five unscaled LOSSES as fp32 [5], the model's statistics."""
        noise = (row_keys_T, column_keys_D)
        logits_TV, stats = self.model(
            tokens_BS, positions_BS, segments_BS, domains_B, noise, self.capacities, True
        )
        targets_T = ops.reshape(targets_BS, (-1,))
        cross_entropy = self.model.vocabulary.cross_entropy(logits_TV, targets_T)
        balance = self.balance * stats["balance_loss"]
        locality = self.locality * stats["locality_loss"]
        z = self.z * stats["z_loss"]
        loss = cross_entropy + balance + locality + z
        losses = ops.stop_gradient(ops.stack((loss, cross_entropy, balance, locality, z)))
        return loss * scale, losses, stats


def micro_batches(
    batch: Batch, step: int, config: Config, world: World
) -> List[Tuple[Tensor, ...]]:
    """The objective's inputs, but for the loss scale, of this process's sequences.

    A micro-batch is an equal part of each node's run of sequences, so that it comes in node runs
    too. A replica has its part of its node's part; a single process has the parts of all nodes.

    Args:
        batch: of the whole job.
        step: from 1; it sets the randomness, which is the same on any number of processes.
        config: the run.
        world: this process's place.
    """
    train = config.train
    topology = world.topology
    rows_T, columns_D = draw_keys(train.seed, step, batch.tokens_BS.size, config.model.hidden_size)
    keys_BS = rows_T.reshape(batch.tokens_BS.shape)
    columns = Tensor(columns_D)
    runs = np.arange(len(batch.domains_B))
    runs = runs.reshape(
        topology.num_nodes, train.accumulation_steps, topology.replicas_per_node, -1
    )
    if world.exchange is None:
        own = runs.swapaxes(0, 1).reshape(train.accumulation_steps, -1)
    else:
        replica_of_job = topology.replica_of_rank(world.communicator.rank)
        node, replica = divmod(replica_of_job, topology.replicas_per_node)
        own = runs[node, :, replica]
    return [batch_inputs(batch, keys_BS, columns, part) for part in own]


def batch_inputs(
    batch: Batch, keys_BS: np.ndarray, columns: Tensor, part: Any
) -> Tuple[Tensor, ...]:
    """The objective's inputs, but for the loss scale, from some sequences of a batch."""
    arrays = (
        batch.tokens_BS,
        batch.targets_BS,
        batch.positions_BS,
        batch.segments_BS,
        batch.domains_B,
    )
    tensors = (Tensor(array[part]) for array in arrays)
    return (*tensors, Tensor(keys_BS[part].reshape(-1)), columns)
