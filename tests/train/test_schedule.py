"""The learning rate against its closed form."""

from __future__ import annotations

import pytest

from pangu_locmoe.config import TrainConfig
from pangu_locmoe.train.schedule import learning_rate


def rates(**settings):
    config = TrainConfig(
        **{
            "steps": 110,
            "warmup_steps": 10,
            "learning_rate": 2.0,
            "final_learning_rate": 0.1,
            **settings,
        }
    )
    return {step: learning_rate(config, step) for step in range(1, config.steps + 1)}


@pytest.mark.parametrize("schedule", ["cosine", "polynomial", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule):
    got = rates(schedule=schedule)
    assert [got[step] for step in range(1, 11)] == pytest.approx(
        [0.2 * step for step in range(1, 11)]
    )


@pytest.mark.parametrize("schedule", ["cosine", "polynomial", "constant"])
@pytest.mark.parametrize("steps", [1, 4, 9, 10])
def test_a_run_that_ends_inside_its_warm_up(schedule, steps):
    assert rates(schedule=schedule, steps=steps) == pytest.approx(
        {step: 0.2 * step for step in range(1, steps + 1)}
    )


def test_cosine():
    got = rates(schedule="cosine")
    # a quarter, a half and all of the way: 0.2 + 1.8 * (1 + cos(pi x)) / 2
    assert got[35] == pytest.approx(0.2 + 1.8 * (1 + 0.5**0.5) / 2)
    assert got[60] == pytest.approx(1.1)
    assert got[110] == pytest.approx(0.2)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_polynomial(power):
    got = rates(schedule="polynomial", polynomial_power=power)
    assert got[35] == pytest.approx(0.2 + 1.8 * 0.75**power)
    assert got[60] == pytest.approx(0.2 + 1.8 * 0.5**power)
    assert got[110] == pytest.approx(0.2)


def test_constant():
    got = rates(schedule="constant")
    assert {got[step] for step in range(10, 111)} == {2.0}


def test_decay_never_rises_and_without_warm_up_starts_below_the_peak():
    got = rates(schedule="cosine", warmup_steps=0)
    assert 1.99 < got[1] < 2.0
    assert all(got[step + 1] < got[step] for step in range(1, 110))
