"""The paper's LSTM in MindSpore: one network whose input is the history of all shares of all layers
and whose output is all shares of the next steps, trained on the past of the trace or on another
run.

What differs from the paper, which leaves most of it open: the history is the last `window` rows as
the means of STEPS stretches, and the output is the means of POINTS stretches of the horizon with a
straight line between them (one output per row would be millions of weights trained on noise); the
network predicts a correction, in logits, to the window's mean, so that untrained it is the window
mean; a softmax per layer makes the shares sum to 1; and the weights kept are those that did best on
a part of the trace's own past that was held out: if nothing helped there by MIN_GAIN, those of the
start, which is the window mean.

B samples, T history stretches, P points, S = L x E series.
"""

from __future__ import annotations

from typing import Any, Tuple

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.forecast.past import Past, Prediction
from pangu_locmoe.expert_load.trace import Trace

Samples = Tuple[NDArray[np.float32], NDArray[np.float32]]

STEPS = 32
POINTS = 8
MIN_ROWS = 30
BATCH = 32
LEARNING_RATE = 3e-3
CHECK_EVERY = 20  # updates between looks at the held-out stretch
HELD_OUT = 0.2  # of the origins, the newest
MIN_GAIN = 0.02  # less than this on the held-out origins is luck
FLOOR = 1e-4  # of a share, before its logarithm


class ShareNetwork(nn.Cell):
    """LSTM over the history, its last state to a correction of the logits of every point."""

    def __init__(
        self, layers: int, experts: int, hidden: int, generator: np.random.Generator
    ) -> None:
        super().__init__()
        series = layers * experts
        self.lstm = nn.LSTM(series, hidden, batch_first=True)
        self.head = nn.Dense(hidden, POINTS * series, weight_init="zeros", bias_init="zeros")
        self.shape = (-1, POINTS, layers, experts)
        for weight in (
            self.lstm.trainable_params()
        ):  # our own draw: the same on every machine and after any other use of MindSpore
            bound = hidden**-0.5
            weight.set_data(
                ms.Tensor(generator.uniform(-bound, bound, weight.shape).astype(np.float32))
            )

    def construct(self, history_BWX: ms.Tensor, base_BLE: ms.Tensor) -> ms.Tensor:
        """Log shares [B, Y, L, E] from the history (1: uniform share) and the logits of its
        mean.
        """
        state_BWD, _ = self.lstm(history_BWX)
        correction_BYLE = self.head(state_BWD[:, -1]).reshape(self.shape)
        return ops.log_softmax(base_BLE.expand_dims(1) + correction_BYLE, -1)


def predict_lstm(
    past: Past,
    step_Y: NDArray[Any],
    window: int,
    hidden: int,
    updates: int,
    seed: int,
    train_on: Trace | None,
) -> Prediction:
    """Train, then forecast.

    Raises DataError for a past that is too short or another run of another shape.
    """
    for name, value in (("window", window), ("hidden", hidden), ("updates", updates)):
        if value < 1:
            raise DataError(f"lstm {name} {value}: must be at least 1")
    teacher_WLE = past.share_WLE
    if train_on is not None:
        teacher_WLE = train_on.share_WLE
        if teacher_WLE.shape[1:] != past.share_WLE.shape[1:]:
            raise DataError(
                f"lstm train_on: that run has {teacher_WLE.shape[1]} layers of "
                f"{teacher_WLE.shape[2]} experts, "
                f"this one {past.share_WLE.shape[1]} of {past.share_WLE.shape[2]}"
            )
    rows_Y = past.rows_ahead(step_Y)
    rows = min(len(past.share_WLE), len(teacher_WLE))
    window, ahead = min(window, rows // 3), min(int(rows_Y[-1]), rows // 5)
    if rows < MIN_ROWS:
        raise DataError(
            f"lstm: {rows} rows are too few to train on, it needs {MIN_ROWS}; choose a later origin"
        )
    generator = np.random.default_rng(seed)
    network = ShareNetwork(past.share_WLE.shape[1], past.share_WLE.shape[2], hidden, generator)
    row_B = _origins(len(past.share_WLE), window, ahead)
    if train_on is None:
        held_B = row_B[-max(1, int(HELD_OUT * len(row_B))) :]
        row_B = row_B[
            row_B + ahead <= held_B[0]
        ]  # what came after an origin trained on is not what is held out
    else:
        held_B, row_B = (
            row_B,
            _origins(len(teacher_WLE), window, ahead),
        )  # does the other run help on this one?
    held_out = _samples(past.share_WLE, held_B, window, ahead)
    start, best = _train(
        network, _samples(teacher_WLE, row_B, window, ahead), held_out, updates, generator
    )

    history_WLE = _stretches(past.share_WLE, np.array([len(past.share_WLE)]), -window, STEPS)
    points_YLE = np.exp(network(*_inputs(history_WLE)).asnumpy()[0].astype(np.float64))
    middle_Y = (np.arange(POINTS) + 0.5) * ahead / POINTS
    points_YX = points_YLE.reshape(POINTS, -1)
    share_YX = np.stack(
        [np.interp(rows_Y - 0.5, middle_Y, series_Y) for series_Y in points_YX.T], axis=1
    )
    notes = {
        "used": "the network"
        if best < start
        else "the window mean: on held-out rows the network was no better",
        "window_rows": window,
        "trained_horizon_rows": ahead,  # beyond it the last point stays
        "held_out_gain": round(1 - best / start, 4) if start > 0 else 0.0,
    }
    return Prediction(share_YX.reshape(len(step_Y), *past.share_WLE.shape[1:]), notes=notes)


def _stretches(
    share_WLE: NDArray[Any], row_B: NDArray[Any], rows: int, parts: int
) -> NDArray[np.float32]:
    """Means of `parts` stretches of the `rows` rows after each row (before it if negative) [B,
    parts, L, E].
    """
    sums = np.concatenate([np.zeros((1, *share_WLE.shape[1:])), np.cumsum(share_WLE, axis=0)])
    edges = np.floor(np.linspace(min(rows, 0), max(rows, 0), parts + 1)).astype(int)
    begins = edges[:-1]  # with fewer rows than parts a row counts in several
    ends = np.maximum(edges[1:], edges[:-1] + 1)
    total = sums[row_B[:, None] + ends] - sums[row_B[:, None] + begins]
    return np.asarray(total / (ends - begins)[:, None, None], dtype=np.float32)


def _origins(rows: int, window: int, ahead: int) -> NDArray[np.int64]:
    """At most 512 rows that have a whole window before them and a whole horizon after."""
    return np.unique(
        np.linspace(window, rows - ahead, min(512, rows - ahead - window + 1))
        .round()
        .astype(np.int64)
    )


def _samples(share_WLE: NDArray[Any], row_B: NDArray[Any], window: int, ahead: int) -> Samples:
    """History [B, W, L, E] and what came [B, Y, L, E]."""
    return _stretches(share_WLE, row_B, -window, STEPS), _stretches(share_WLE, row_B, ahead, POINTS)


def _inputs(history_BWLE: NDArray[np.float32]) -> tuple[ms.Tensor, ms.Tensor]:
    experts = history_BWLE.shape[3]
    base_BLE = np.log(np.maximum(history_BWLE.mean(axis=1), FLOOR))
    return ms.Tensor((history_BWLE * experts - 1).reshape(*history_BWLE.shape[:2], -1)), ms.Tensor(
        base_BLE
    )


def _train(
    network: ShareNetwork,
    samples: Samples,
    held_out: Samples,
    updates: int,
    generator: np.random.Generator,
) -> tuple[float, float]:
    """Mean absolute error on the held-out samples before training and of the weights kept."""
    history_BWLE, came_BYLE = samples
    held_inputs = _inputs(held_out[0])
    optimizer = nn.Adam(network.trainable_params(), LEARNING_RATE)

    def loss_of(history_BWX: ms.Tensor, base_BLE: ms.Tensor, came: ms.Tensor) -> ms.Tensor:
        return (
            -(came * network(history_BWX, base_BLE)).sum(axis=-1).mean()
        )  # cross-entropy: least at the mean share

    gradients = ms.jit(
        ms.value_and_grad(loss_of, None, network.trainable_params())
    )  # five times as fast as operation by operation

    def error_of() -> float:
        return float(np.abs(np.exp(network(*held_inputs).asnumpy()) - held_out[1]).mean())

    start = error_of()
    best = start * (1 - MIN_GAIN)
    kept = [weight.asnumpy().copy() for weight in network.trainable_params()]
    found = False
    for update in range(1, updates + 1):
        pick_B = generator.integers(0, len(history_BWLE), BATCH)
        _, gradient = gradients(*_inputs(history_BWLE[pick_B]), ms.Tensor(came_BYLE[pick_B]))
        optimizer(gradient)
        if update % CHECK_EVERY == 0 or update == updates:
            error = error_of()
            if error < best:
                found = True
                best = error
                kept = [weight.asnumpy().copy() for weight in network.trainable_params()]
    for weight, value in zip(network.trainable_params(), kept):
        weight.set_data(ms.Tensor(value))
    return start, best if found else start
