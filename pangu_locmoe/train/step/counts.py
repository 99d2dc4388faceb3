"""One optimizer step of several processes, and what of it all of them must know.

The whole step runs in PyNative around compiled parts of the model, because the exchange's sizes follow the routing.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from pangu_locmoe.config import CapacityConfig, Config
from pangu_locmoe.data.loader import Batch
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.slot_factors import starting_factors
from pangu_locmoe.noise import draw_keys
from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.exchange import Exchange, Ledger
from pangu_locmoe.parallel.gradients import KINDS, gather_pieces, kinds, pieces, reduce_gradients, squared_norm
from pangu_locmoe.parallel.tensor import Piece
from pangu_locmoe.parallel.timeline import Timeline, gather_spans
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.train.step import LOSSES, Objective, Stepper, StepResult, batch_inputs


class DistributedStepper(Stepper):
    """A `Stepper` whose batch and experts are shared by the ranks of a job.

    Args:
        model: this rank's model, with an exchange.
        config: the run.
        capacities: slots for each expert over the whole expert-parallel group.
        topology: who holds what.
        exchange: the model's; its ledger is read after each step.
    """

    _accumulates = False

    def __init__(self, model: PanguSigma, config: Config, capacities: Tuple[int, ...], topology: Topology, exchange: Exchange) -> None:
        self.topology, self.exchange = topology, exchange
        self.communicator = exchange.communicator
        self.factors = starting_factors(config.moe.capacity)
        super().__init__(model, config, capacities)
        self._kinds = kinds(self.parameters, self.optimizer.pieces)

    def _pieces(self) -> Optional[List[Optional[Piece]]]:
        return pieces(self.parameters, self.topology, self.communicator.rank) if self.config.parallel.shard_optimizer else None

    def set_capacities(self, capacities: Tuple[int, ...]) -> None:
        self.capacities = capacities
        objective = Objective(self.model, self.config, capacities)
        self._gradient = ms.value_and_grad(objective, None, self.optimizer.parameters, has_aux=True)

    def set_factors(self, factors: CapacityConfig) -> None:
        """Train with other local and remote factors from the next step on (static sizes)."""
        self.factors = factors
        for layer in self.model.moe_layers.values():
            layer.set_factors(factors)

    def __call__(self, batch: Batch, step: int, learning_rate: float) -> StepResult:
        if step != self.config.trace.timeline:
            return self._advance(batch, step, learning_rate)
        timeline, started = Timeline(), time.time()
        self.exchange.timeline = timeline
        with timeline.watch([layer.experts for layer in self.model.moe_layers.values()]):
            result = self._advance(batch, step, learning_rate)
        self.exchange.timeline = None
        timeline.add("step", started)
        return replace(result, spans=gather_spans(timeline, self.communicator))

    def _advance(self, batch: Batch, step: int, learning_rate: float) -> StepResult:
        scale = self.loss_scale.value if self.loss_scale else 1.0
        self.exchange.ledger.take()  # an evaluation since the last step is not this step's traffic
        gradients: List[Tensor] = []
        reports = []
        for inputs in self._micro_batches(batch, step):
            (_, losses, stats), new = self._gradient(*inputs, Tensor(scale, ms.float32))
            gradients = [total + more for total, more in zip(gradients, new)] if gradients else list(new)
            reports.append((losses, stats))
        skipped, norm = self._update(gradients, 1.0 / (scale * self.config.train.accumulation_steps), learning_rate, step)
        traffic = gather_ledgers(self.exchange.ledger.take(), self.communicator)
        return world_result(reports, norm, skipped, traffic, self.topology, self.communicator, self.config.parallel.sequence_parallel)

    def _micro_batches(self, batch: Batch, step: int) -> Iterator[Tuple[Tensor, ...]]:
        """The objective's inputs, but for the loss scale, of this place's sequences.

        As in one process, a micro-batch is an equal share of each node's run; a place has its part of its node's share.
        """
        train, topology = self.config.train, self.topology
        rows_T, columns_D = draw_keys(train.seed, step, batch.tokens_BS.size, self.config.model.hidden_size)
        keys_BS, columns = rows_T.reshape(batch.tokens_BS.shape), Tensor(columns_D)
        node, place = divmod(topology.place_of_rank(self.communicator.rank), topology.places_per_node)
        runs = np.arange(len(batch.domains_B)).reshape(topology.num_nodes, train.accumulation_steps, topology.places_per_node, -1)
        return (batch_inputs(batch, keys_BS, columns, part) for part in runs[node, :, place])

    def _update(self, gradients: List[Tensor], factor: float, learning_rate: float, step: int) -> Tuple[bool, float]:
        began, started = time.time(), time.perf_counter()
        reduced = reduce_gradients(gradients, self.parameters, self.optimizer.pieces, self.topology, self.communicator)
        self._reduced(began, started)
        reduced = [gradient * factor for gradient in reduced] if factor != 1.0 else reduced
        parts = [tuple(gradient for gradient, one in zip(reduced, self._kinds) if one == each) for each in KINDS]
        whole, slices, experts, shared = map(self.optimizer.squared_norm, parts)
        own = shared if any(self.optimizer.divided) else None
        norm = ops.sqrt(squared_norm(whole, slices, experts, own, self.topology, self.communicator))
        value = float(norm.asnumpy())
        skipped = self._overflows(value)
        if not skipped:
            self.optimizer.update(tuple(reduced), Tensor(learning_rate, ms.float32), Tensor(step, ms.int32), norm)
            if own is not None:
                began, started = time.time(), time.perf_counter()
                gather_pieces(self.optimizer.updated, self.parameters, self.optimizer.pieces, self.topology, self.communicator)
                self._reduced(began, started)
        return skipped, value

    def _reduced(self, began: float, started: float) -> None:
        """Account for a reduction, or a gathering of pieces, that is over now; `began` and `started` are of time's two clocks."""
        self.exchange.ledger.reduce_seconds += time.perf_counter() - started
        if self.exchange.timeline is not None:
            self.exchange.timeline.add("reduction", began)


def gather_ledgers(own: Ledger, communicator: Communicator) -> Ledger:
    """Bytes and messages of all ranks together; the seconds of the slowest."""
    seconds = [round(own.seconds * 1e6), round(own.reduce_seconds * 1e6)]
    numbers = [own.intra_node_bytes, own.inter_node_bytes, own.intra_node_messages, own.inter_node_messages, *seconds]
    # Bytes of one rank and step fit 31 bits only up to 2 GiB: sent in units of 1 KiB and a rest.
    split = [part for number in numbers for part in divmod(number, 1024)]
    gathered = communicator.all_gather(Tensor(np.asarray(split, np.int32))).asnumpy().astype(np.int64)
    values = gathered[:, 0::2] * 1024 + gathered[:, 1::2]
    totals = values.sum(axis=0).tolist()
    return Ledger(totals[0], totals[1], totals[2], totals[3], *(values[:, 4:].max(axis=0) / 1e6).tolist())


def world_result(
    reports: List[Tuple[Tensor, Dict[str, Tensor]]],
    norm: float,
    skipped: bool,
    traffic: Ledger,
    topology: Topology,
    communicator: Communicator,
    rows_divided: bool,
) -> StepResult:
    """The step's figures over all places, whose ranks have the same but for their rows' sums; one gather for all of them."""
    losses = np.mean([losses.asnumpy() for losses, _ in reports], axis=0, dtype=np.float64)
    stats = [{name: value.asnumpy() for name, value in stats.items()} for _, stats in reports]
    parts: Dict[str, Any] = {"losses": losses, "layer_sums": np.sum([s["layer_sums"] for s in stats], axis=0)}
    sparse = "load_LNE" in stats[0]
    if sparse:
        parts["dropped"] = np.sum([s["dropped_LE"] for s in stats], axis=0)
        if "unrouted_L" in stats[0]:
            parts["unrouted"] = np.mean([s["unrouted_L"] for s in stats])
        parts["cosine"] = np.concatenate([s["cosine_LT"] for s in stats], axis=1)
    flat = np.concatenate([np.ravel(part) for part in parts.values()]).astype(np.float32)
    everyones = communicator.all_gather(Tensor(flat)).asnumpy()
    gathered = everyones[:: topology.tensor_parallel]
    world: Dict[str, np.ndarray] = {}
    start = 0
    for name, part in parts.items():
        source = everyones if name == "layer_sums" and rows_divided else gathered
        world[name] = source[:, start : start + part.size].reshape(-1, *part.shape)
        start += part.size
    return StepResult(
        losses=dict(zip(LOSSES, world["losses"].mean(axis=0, dtype=np.float64).tolist())),
        grad_norm=norm,
        load_LNE=sum(s["load_LNE"] for s in stats).astype(np.int64) if sparse else np.zeros((0, 1, 0), np.int64),
        dropped_LE=world["dropped"].sum(axis=0).astype(np.int64) if sparse else np.zeros((0, 0), np.int64),
        cosine_LT=np.concatenate(list(world["cosine"]), axis=1) if sparse else np.zeros((0, 0), np.float32),
        layer_sums=world["layer_sums"].sum(axis=0),
        skipped=skipped,
        unrouted=float(world["unrouted"].mean()) if "unrouted" in world else None,
        traffic=traffic,
    )
