"""The learning rate as a function of the updates made."""

from __future__ import annotations

import math

from pangu_locmoe.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of update 1, 2, ..., config.steps (steps that fp16 skips make none): linear
    warm-up, then cosine or polynomial decay, or constant.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    cosine = config.schedule == "cosine"
    remaining = (
        0.5 * (1 + math.cos(math.pi * progress))
        if cosine
        else (1 - progress) ** config.polynomial_power
    )
    return config.learning_rate * (
        config.final_learning_rate + (1 - config.final_learning_rate) * remaining
    )
