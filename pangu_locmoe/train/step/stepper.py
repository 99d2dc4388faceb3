"""One optimizer step: forward, backward, clip, update.

In fp32 or bf16 without accumulation the whole step is one compiled graph. Accumulation and fp16's loss scaling need a
look between backward and update, so there a step is K compiled backward passes and one compiled update.

Letters: B batch, S sequence, T = B*S tokens, L MoE layers, N source nodes, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, ClassVar, Dict, List, Optional, Tuple

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops

from pangu_locmoe.config import Config
from pangu_locmoe.data.loader import Batch
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.noise import draw_keys
from pangu_locmoe.parallel.exchange import Ledger
from pangu_locmoe.parallel.tensor import Piece
from pangu_locmoe.parallel.timeline import Span
from pangu_locmoe.train.buffers import Accumulate, BufferedNorm, BufferedUpdate, gradient_buffers
from pangu_locmoe.train.optimizer import AdamW

KEPT_STEPS = 6  # compiled ones, each for its capacities
LOSSES = ("loss", "cross_entropy", "balance_loss", "locality_loss", "z_loss")


@dataclass(frozen=True)
class StepResult:
    """What one step did, on the host.

    losses: loss, cross_entropy, balance_loss, locality_loss, z_loss; the router losses weighted, so that they add up.
    grad_norm: global norm before clipping.
    load_LNE, dropped_LE: assignments of tokens to experts, int64. cosine_LT: fp32. Empty without MoE layers.
    layer_sums: one number for each layer, finite exactly where the layer's output was.
    skipped: fp16 overflow; no update was made.
    unrouted: share of the tokens without any expert, where one may have several; else None.
    traffic: what all ranks exchanged; None in a single process.
    spans: what each rank did when, in the step of trace.timeline.
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


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16: halve on overflow, double after `window` good steps."""

    value: float
    window: int
    good_steps: int = field(default=0)

    def update(self, overflow: bool) -> None:
        if overflow:
            self.value, self.good_steps = max(1.0, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps == self.window:
            self.value, self.good_steps = self.value * 2, 0


class Objective(nn.Cell):
    """Cross entropy plus the weighted router losses, times a loss scale: L = L_ce + alpha L_aux + mu L_loc (LocMoE)."""

    def __init__(self, model: PanguSigma, config: Config, capacities: Tuple[int, ...]) -> None:
        super().__init__(auto_prefix=False)
        moe = config.moe
        self.model, self.capacities = model, capacities
        self.balance, self.locality, self.z = moe.balance_loss, config.locality_weight, moe.z_loss

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
        """Returns the scaled loss, the five unscaled LOSSES as fp32 [5], and the model's statistics."""
        noise = (row_keys_T, column_keys_D)
        logits_TV, stats = self.model(tokens_BS, positions_BS, segments_BS, domains_B, noise, self.capacities, True)
        cross_entropy = self.model.vocabulary.cross_entropy(logits_TV, ops.reshape(targets_BS, (-1,)))
        balance, locality, z = self.balance * stats["balance_loss"], self.locality * stats["locality_loss"], self.z * stats["z_loss"]
        loss = cross_entropy + balance + locality + z
        return loss * scale, ops.stop_gradient(ops.stack((loss, cross_entropy, balance, locality, z))), stats


class FusedStep(nn.Cell):
    """Forward, backward and update in one graph."""

    def __init__(self, objective: Objective, optimizer: AdamW) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.gradient = ms.value_and_grad(objective, None, optimizer.parameters, has_aux=True)

    def construct(self, learning_rate: Tensor, step: Tensor, *inputs: Tensor) -> Tuple[Tensor, Dict[str, Tensor], Tensor]:
        """`inputs` as for the objective. Returns the losses, the statistics and the gradient's norm."""
        (_, losses, stats), gradients = self.gradient(*inputs)
        return losses, stats, self.optimizer(gradients, learning_rate, step)


class Stepper:
    """Runs optimizer steps; owns the optimizer's state and the loss scale.

    Args:
        model: what to train, in place.
        config: the run.
        capacities: slots for each expert in each MoE layer; `set_capacities` compiles anew for those not met of late.
    """

    _accumulates: ClassVar[bool] = True  # gradients in buffers between compiled parts, where a step has several of them

    def __init__(self, model: PanguSigma, config: Config, capacities: Tuple[int, ...]) -> None:
        self.config, self.model = config, model
        self.parameters = list(model.trainable_params())
        train = config.train
        self.optimizer = AdamW.of(self.parameters, train, self._pieces())
        self.loss_scale = LossScale(train.loss_scale, train.loss_scale_window) if train.precision == "fp16" else None
        self._buffers: Optional[ParameterTuple] = None
        if self._accumulates and train.has_buffers:
            self._buffers = gradient_buffers(self.parameters)
            compiled = self._compiler()
            self._norm = compiled(BufferedNorm(self.optimizer, self._buffers))
            self._apply = compiled(BufferedUpdate(self.optimizer, self._buffers, True))
            self._clear = compiled(BufferedUpdate(self.optimizer, self._buffers, False))
        self._steps: Dict[Tuple[int, ...], Callable[..., Any]] = {}  # the latest used last
        self.set_capacities(capacities)

    def set_capacities(self, capacities: Tuple[int, ...]) -> None:
        """Use other capacities from the next step on; the step of capacities that were used of late is used again."""
        self.capacities = capacities
        self._step = self._steps.pop(capacities) if capacities in self._steps else self._compile(capacities)
        self._steps[capacities] = self._step
        if len(self._steps) > KEPT_STEPS:
            del self._steps[next(iter(self._steps))]

    def _pieces(self) -> Optional[List[Optional[Piece]]]:
        """What of each parameter this process updates; None: all of all."""
        return None

    def _compile(self, capacities: Tuple[int, ...]) -> Callable[..., Any]:
        """The step, or with buffers the part of it that fills them."""
        objective = Objective(self.model, self.config, capacities)
        if self._buffers is None:
            return self._compiler()(FusedStep(objective, self.optimizer))
        return self._compiler()(Accumulate(objective, self.optimizer.parameters, self._buffers))

    def _compiler(self) -> Callable[[nn.Cell], Callable[..., Any]]:
        return ms.jit if self.config.train.mode == "graph" else _as_is

    def __call__(self, batch: Batch, step: int, learning_rate: float) -> StepResult:
        """Train on one global batch. `step` counts from 1."""
        rows_T, columns_D = draw_keys(self.config.train.seed, step, batch.tokens_BS.size, self.config.model.hidden_size)
        keys_BS, columns = rows_T.reshape(batch.tokens_BS.shape), Tensor(columns_D)
        rate, number = Tensor(learning_rate, ms.float32), Tensor(step, ms.int32)
        if self._buffers is None:
            inputs = batch_inputs(batch, keys_BS, columns, slice(None))
            losses, stats, norm = self._step(rate, number, *inputs, Tensor(1.0, ms.float32))
            return _result([(losses, stats)], float(norm.asnumpy()))
        return self._accumulated(batch, keys_BS, columns, rate, number)

    def _accumulated(self, batch: Batch, keys_BS: np.ndarray, columns: Tensor, rate: Tensor, number: Tensor) -> StepResult:
        scale = self.loss_scale.value if self.loss_scale else 1.0
        micro_batches = self.config.train.accumulation_steps
        outputs = []
        for part in _node_parts(len(batch.domains_B), self.config.parallel.emulated_nodes, micro_batches):
            outputs.append(self._step(*batch_inputs(batch, keys_BS, columns, part), Tensor(scale, ms.float32)))
        factor = 1.0 / (scale * micro_batches)
        norm = float(self._norm().asnumpy()) * factor
        skipped = self._overflows(norm)
        update = self._clear if skipped else self._apply
        update(Tensor(factor, ms.float32), Tensor(norm, ms.float32), rate, number)
        return _result(outputs, norm, skipped)

    def _overflows(self, norm: float) -> bool:
        """Whether fp16 overflowed, so that this step makes no update; the loss scale follows.

        Without loss scaling a norm that is not finite is a divergence, which the loop reports.
        """
        if self.loss_scale is None:
            return False
        overflow = not np.isfinite(norm)
        self.loss_scale.update(overflow)
        return overflow


def _as_is(cell: nn.Cell) -> Callable[..., Any]:
    return cell


def batch_inputs(batch: Batch, keys_BS: np.ndarray, columns: Tensor, part: Any) -> tuple[Tensor, ...]:
    """The objective's inputs, but for the loss scale, from some sequences of a batch."""
    arrays = (batch.tokens_BS, batch.targets_BS, batch.positions_BS, batch.segments_BS, batch.domains_B)
    return (*(Tensor(array[part]) for array in arrays), Tensor(keys_BS[part].reshape(-1)), columns)


def _node_parts(batch_size: int, num_nodes: int, micro_batches: int) -> list[np.ndarray]:
    """Sequence numbers of each micro-batch: an equal share of each node's run, so that micro-batches too come in node runs."""
    places = np.arange(batch_size).reshape(num_nodes, micro_batches, -1)
    return [places[:, part].reshape(-1) for part in range(micro_batches)]


def _result(outputs: list[tuple[Tensor, Dict[str, Tensor]]], norm: float, skipped: bool = False) -> StepResult:
    losses = np.mean([losses.asnumpy() for losses, _ in outputs], axis=0, dtype=np.float64)
    stats = [{name: value.asnumpy() for name, value in stats.items()} for _, stats in outputs]
    sparse = "load_LNE" in stats[0]
    return StepResult(
        losses=dict(zip(LOSSES, losses.tolist())),
        grad_norm=norm,
        load_LNE=sum(s["load_LNE"] for s in stats).astype(np.int64) if sparse else np.zeros((0, 1, 0), np.int64),
        dropped_LE=sum(s["dropped_LE"] for s in stats).astype(np.int64) if sparse else np.zeros((0, 0), np.int64),
        cosine_LT=np.concatenate([s["cosine_LT"] for s in stats], axis=1) if sparse else np.zeros((0, 0), np.float32),
        layer_sums=np.sum([s["layer_sums"] for s in stats], axis=0),
        skipped=skipped,
        unrouted=float(np.mean([s["unrouted_L"] for s in stats])) if "unrouted_L" in stats[0] else None,
    )
