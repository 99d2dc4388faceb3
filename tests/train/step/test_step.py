"""One optimizer step in all its ways: compiled and not, accumulated, recomputed, in half
precision.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from support import tiny

from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.train.step import LossScale

DROPLESS = {"capacity": {"policy": "dropless"}}
NO_ROUTER_LOSSES = {"balance_loss": 0.0, "locality_loss": 0.0, **DROPLESS}


def locmoe(**train):
    """Both router losses at work, drops, dropout, and two nodes."""
    return tiny.tiny_config(
        model={"dropout": 0.1, "init_std": 0.1},
        moe={
            "balance_loss": 0.1,
            "locality_loss": 0.3,
            "z_loss": 0.01,
            "capacity": {"factor": 1.0},
        },
        parallel={"nodes": 2},
        train={"learning_rate": 0.003, **train},
    )


@functools.cache
def locmoe_steps():
    return tiny.steps(locmoe(), 4)


def switch(accumulation_steps: int, nodes: int, dropout: float = 0.1, jitter: float = 0.1, **train):
    return tiny.tiny_config(
        model={"dropout": dropout, "init_std": 0.1},
        moe={"router": "switch", "jitter": jitter, **NO_ROUTER_LOSSES},
        parallel={"nodes": nodes},
        train={"learning_rate": 0.003, "accumulation_steps": accumulation_steps, **train},
    )


@functools.cache
def switch_steps(accumulation_steps: int, nodes: int):
    return tiny.steps(switch(accumulation_steps, nodes), 4)


def same(got, wanted):
    """Losses and gradient norms to 1e-5 and every count exactly."""
    np.testing.assert_allclose(tiny.losses(got), tiny.losses(wanted), rtol=1e-5, atol=1e-7)
    for one, other in zip(got, wanted):
        np.testing.assert_array_equal(one.load_LNE, other.load_LNE)
        np.testing.assert_array_equal(one.dropped_LE, other.dropped_LE)


def test_compiled_and_not_is_the_same():
    wanted = locmoe_steps()
    assert all(result.dropped_LE.sum() > 0 for result in wanted)
    same(tiny.steps(locmoe(mode="pynative"), 2), wanted[:2])


def test_compiled_and_not_is_the_same_with_jitter_and_accumulation():
    same(tiny.steps(switch(2, 2, mode="pynative"), 2), switch_steps(2, 2)[:2])


def test_jitter_and_dropout_do_something():
    """Else the comparisons here would compare nothing."""
    noise = [{"dropout": 0.0, "jitter": 0.0}, {"jitter": 0.0}, {}]
    still, dropout_only, both = (
        tiny.steps(switch(1, 1, mode="pynative", **values), 1)[0] for values in noise
    )
    assert abs(dropout_only.losses["loss"] - still.losses["loss"]) > 1e-3
    assert (both.load_LNE != dropout_only.load_LNE).any()


@pytest.mark.parametrize(
    "accumulation_steps, nodes",
    [(2, 2), *(pytest.param(4, nodes, marks=pytest.mark.slow) for nodes in (1, 2))],
)
def test_accumulation_equals_the_large_batch(accumulation_steps, nodes):
    """With router losses off and without drops; dropout, jitter and the source nodes' counts are
    the same too.

    The router losses are those of each micro-batch, averaged: the balance loss is a product of two
    averages over tokens (and the locality loss a divergence of one), and a mean of products is not
    the product of means. This is what each rank of a data-parallel run computes as well. Capacity
    is per micro-batch for the same reason.
    """
    same(switch_steps(accumulation_steps, nodes), switch_steps(1, nodes))


@pytest.mark.slow
def test_accumulation_equals_the_large_batch_with_hash():
    def config(accumulation_steps):
        return tiny.tiny_config(
            moe={"router": "hash", **DROPLESS},
            train={"learning_rate": 0.003, "accumulation_steps": accumulation_steps},
        )

    same(tiny.steps(config(4), 4), tiny.steps(config(1), 4))


def test_accumulated_router_losses_are_the_mean_over_micro_batches():
    """Not lost, not added up: at the first step, where weights are equal, they are near the
    large batch's.
    """
    whole = locmoe_steps()[0].losses
    parts = tiny.steps(locmoe(accumulation_steps=2), 1)[0].losses
    for name in ("balance_loss", "locality_loss", "z_loss"):
        assert parts[name] == pytest.approx(whole[name], rel=0.25)
        assert parts[name] > 0


def test_recomputation_changes_nothing():
    """The losses of routers inside recomputed blocks are counted once."""
    same(tiny.steps(locmoe(recompute=True), 4), locmoe_steps())


def test_loss_scale_halves_on_overflow_and_doubles_after_a_window_of_good_steps():
    scale = LossScale(8.0, 3)
    seen = []
    for overflow in (False, False, True, False, False, False, False, True):
        scale.update(overflow)
        seen.append(scale.value)
    assert seen == [8, 8, 4, 4, 4, 8, 8, 4]
    assert scale.good_steps == 0


def test_loss_scale_stays_at_least_one():
    scale = LossScale(2.0, 1000)
    for _ in range(5):
        scale.update(True)
    assert scale.value == 1.0


def fp16(**train):
    return tiny.tiny_config(
        moe={"router": "switch", **DROPLESS},
        train={"learning_rate": 0.003, "precision": "fp16", "loss_scale": 1024.0, **train},
    )


@functools.cache
def fp16_steps():
    return tiny.steps(fp16(), 15)


@pytest.mark.slow
def test_half_precision_trains_like_single_precision():
    """Tolerance 1e-2: fp16 has 11 bits, so that every activation is off by up to 5e-4 of itself, a
    token near the border of two experts may go to the other one, and what the updates make of that
    adds up over the steps.
    """
    half = tiny.losses(fp16_steps())
    single = tiny.losses(tiny.steps(fp16(precision="fp32"), 15))
    assert np.isfinite(half).all()
    assert half[-1, 0] < half[0, 0] - 1
    np.testing.assert_allclose(half[:, 0], single[:, 0], rtol=1e-2)
    assert not np.array_equal(half, single)


def test_an_overflow_skips_the_update_and_halves_the_scale():
    config = fp16(loss_scale=2.0**40)
    stepper = tiny.make_stepper(config)
    batch = next(tiny.batches(config, prepare(config, False)))
    state = [*stepper.parameters, *stepper.optimizer.moment_m, *stepper.optimizer.moment_v]
    before = [parameter.asnumpy().copy() for parameter in state]
    result = stepper(batch, 1, 0.003)
    assert (
        result.skipped and not np.isfinite(result.grad_norm) and np.isfinite(result.losses["loss"])
    )
    assert stepper.updates == 0
    assert stepper.loss_scale.value == 2.0**39
    for parameter, array in zip(state, before):
        np.testing.assert_array_equal(parameter.asnumpy(), array)
    # What overflowed is gone from the gradient buffers: the next step is as good as a first one.
    stepper.loss_scale.value = 1024.0
    again = stepper(batch, 1, 0.003)
    assert not again.skipped
    np.testing.assert_array_equal(tiny.losses([again]), tiny.losses(fp16_steps()[:1]))
    assert any((parameter.asnumpy() != array).any() for parameter, array in zip(state, before))


def test_adam_counts_updates_not_steps():
    """After three skipped steps the first update is Adam's first: without its bias correction it
    would be several times larger.
    """
    config = fp16(mode="pynative")
    batch = next(tiny.batches(config, prepare(config, False)))
    late = tiny.make_stepper(config)
    early = tiny.make_stepper(config)
    late.loss_scale.value = 2.0**60
    assert all(late(batch, step, 0.003).skipped for step in (1, 2, 3))
    late.loss_scale.value = 1024.0
    for stepper, step in ((late, 4), (early, 1)):
        assert not stepper(batch, step, 0.003).skipped
    assert (late.updates, early.updates) == (1, 1)
    for own, other in zip(late.parameters, early.parameters):
        np.testing.assert_array_equal(own.asnumpy(), other.asnumpy())
