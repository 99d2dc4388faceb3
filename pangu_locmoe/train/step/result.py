"""What a step reports, put together from all micro-batches and all ranks.

Letters: T tokens, L MoE layers, N source nodes, E experts, U
replicas, I micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
from mindspore import Tensor

from pangu_locmoe.parallel.communicator import Communicator
from pangu_locmoe.parallel.exchange import Ledger, Traffic
from pangu_locmoe.parallel.timeline import Span
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.step.objective import LOSSES

_COUNTS = tuple(each.name for each in fields(Traffic))

Report = Tuple[Tensor, Dict[str, Tensor]]
"""A micro-batch's losses and statistics, as the objective returns them."""


@dataclass(frozen=True)
class StepResult:
    """What one step did, on the host.

    losses: loss, cross_entropy, balance_loss, locality_loss, z_loss; the router losses weighted, so
        that they add up.
    grad_norm: global norm before clipping.
    load_LNE, dropped_LE: assignments of tokens to experts, int64; empty without MoE layers.
    cosine_LT: fp32; empty without MoE layers.
    layer_sums: one number for each layer, finite exactly where the layer's output was.
    skipped: fp16 overflow; no update was made.
    unrouted: fraction of the tokens without any expert, where one may have several; else None.
    traffic: what all ranks exchanged; None in a single process.
    spans: what each rank did when, in the step of trace.timeline.
    loads_ILNE: load_LNE of each micro-batch; None: of the only one.
    bias_LX: the routers' biases that evened the load of the last micro-batch, fp32; None without
        moe.balance: quantile.
    """

    losses: Dict[str, float]
    grad_norm: float
    load_LNE: np.ndarray
    dropped_LE: np.ndarray
    cosine_LT: np.ndarray
    layer_sums: np.ndarray
    skipped: bool = False
    unrouted: Optional[float] = None
    traffic: Optional[Ledger] = None
    spans: Optional[List[List[Span]]] = None
    loads_ILNE: Optional[np.ndarray] = None
    bias_LX: Optional[np.ndarray] = None


def step_result(
    reports: Sequence[Report],
    norm: float,
    skipped: bool,
    traffic: Optional[Ledger],
    world: World,
    rows_divided: bool,
) -> StepResult:
    """The step's figures over all micro-batches and replicas; a single process is a world of one.

    Args:
        reports: this process's, one for each micro-batch.
        norm: of the whole gradient.
        skipped: whether no update was made.
        traffic: what all ranks exchanged.
        world: the others; one gather brings all of their figures.
        rows_divided: whether the ranks of a replica have rows of their own (sequence parallelism),
            so that layer sums differ; everything else is the same on all ranks of a replica.
    """
    stats = [{name: value.asnumpy() for name, value in stats.items()} for _, stats in reports]
    losses = [losses.asnumpy() for losses, _ in reports]
    own = {
        "losses": np.mean(losses, axis=0, dtype=np.float64),
        "layer_sums": np.sum([s["layer_sums"] for s in stats], axis=0),
    }
    sparse = "load_LNE" in stats[0]
    if sparse:
        own["dropped"] = np.sum([s["dropped_LE"] for s in stats], axis=0)
        own["cosine"] = np.concatenate([s["cosine_LT"] for s in stats], axis=1)
    if "unrouted_L" in stats[0]:
        own["unrouted"] = np.mean([s["unrouted_L"] for s in stats])
    everyones = _gather(own, world.communicator)
    size = world.topology.tensor_parallel
    replicas = {name: values[::size] for name, values in everyones.items()}
    layer_sums = (everyones if rows_divided else replicas)["layer_sums"]
    return StepResult(
        losses=dict(zip(LOSSES, replicas["losses"].mean(axis=0, dtype=np.float64).tolist())),
        grad_norm=norm,
        # The MoE layers of every rank know the counts of the whole world.
        load_LNE=_total(s["load_LNE"] for s in stats) if sparse else np.zeros((0, 1, 0), np.int64),
        dropped_LE=_total(replicas["dropped"]) if sparse else np.zeros((0, 0), np.int64),
        cosine_LT=_join(replicas["cosine"]) if sparse else np.zeros((0, 0), np.float32),
        layer_sums=layer_sums.sum(axis=0),
        skipped=skipped,
        unrouted=float(replicas["unrouted"].mean()) if "unrouted" in replicas else None,
        traffic=traffic,
        bias_LX=stats[-1].get("bias_LX"),  # the same on all ranks
        loads_ILNE=np.stack([s["load_LNE"] for s in stats]) if sparse else None,
    )


def _total(counts: Iterable[np.ndarray]) -> np.ndarray:
    return np.sum(np.stack(list(counts)), axis=0).astype(np.int64)


def _join(cosine_ULT: np.ndarray) -> np.ndarray:
    """The tokens of all replicas in one row for each layer."""
    return np.concatenate(list(cosine_ULT), axis=1)


def _gather(own: Dict[str, np.ndarray], communicator: Communicator) -> Dict[str, np.ndarray]:
    """Each array of every rank, [ranks, ...] fp32."""
    flat = np.concatenate([np.ravel(part) for part in own.values()]).astype(np.float32)
    # Alone there is nobody to ask: an operator outside of a graph takes longer than all else here.
    gathered = flat[None]
    if communicator.size > 1:
        gathered = communicator.all_gather(Tensor(flat)).asnumpy()
    ends = np.cumsum([np.size(part) for part in own.values()])
    columns = np.split(gathered, ends[:-1], axis=1)
    return {name: part.reshape(-1, *np.shape(own[name])) for name, part in zip(own, columns)}


def gather_ledgers(own: Ledger, communicator: Communicator) -> Ledger:
    """Bytes and messages of all ranks together; the seconds of the slowest."""
    seconds = [round(own.seconds * 1e6), round(own.reduce_seconds * 1e6)]
    counts = [getattr(part, name) for part in (own, own.reduction) for name in _COUNTS]
    numbers = [*counts, *seconds]
    # Bytes of one rank and step fit 31 bits only up to 2 GiB: sent in units of 1 KiB and a rest.
    split = [part for number in numbers for part in divmod(number, 1024)]
    gathered = communicator.all_gather(Tensor(np.asarray(split, np.int32))).asnumpy()
    values = gathered[:, 0::2].astype(np.int64) * 1024 + gathered[:, 1::2]
    totals = values[:, : len(counts)].sum(axis=0).tolist()
    exchanged, reduced = totals[: len(_COUNTS)], totals[len(_COUNTS) :]
    slowest = (values[:, len(counts) :].max(axis=0) / 1e6).tolist()
    return Ledger(*exchanged, *slowest, Traffic(*reduced))  # type: ignore[call-arg]
