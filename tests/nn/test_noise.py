"""The step's randomness: uniform, independent, repeatable."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor
from scipy import stats
from support.numeric import tensor

from pangu_locmoe.nn.noise import draw_keys, dropout, uniform

TOKENS = 1024
FEATURES = 256


def draw(step: int, site: int, seed: int = 1) -> np.ndarray:
    rows, columns = draw_keys(seed, step, TOKENS, FEATURES)
    return uniform((Tensor(rows), Tensor(columns)), site).asnumpy()


def test_keys_are_fixed_by_seed_and_step_and_are_32_bits():
    first = draw_keys(1, 5, 7, 3)
    assert [key.shape for key in first] == [(7,), (3,)]
    assert all(key.dtype == np.int32 for key in first)
    for again, wanted in zip(draw_keys(1, 5, 7, 3), first):
        np.testing.assert_array_equal(again, wanted)
    for seed, step in ((1, 6), (2, 5), (5, 1)):
        assert not (draw_keys(seed, step, 7, 3)[0] == first[0]).any()


@pytest.mark.parametrize("site", [0, 1, 7, 1003])
def test_numbers_are_uniform(site):
    numbers = draw(1, site)
    count = numbers.size
    assert numbers.shape == (TOKENS, FEATURES)
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # five standard errors; the variance of a uniform number is 1/12
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5
    # sums of rows and columns of independent numbers are normal: 1/12 per number
    for axis in (0, 1):
        z = (numbers.mean(axis, dtype=np.float64) - 0.5) * (12 * numbers.shape[axis]) ** 0.5
        assert stats.kstest(z, "norm").pvalue > 1e-4
    bins = np.bincount((numbers.ravel() * 256).astype(int), minlength=256)
    assert stats.chisquare(bins).pvalue > 1e-4
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 0), (1, 1)),
        ((1, 3), (1, 4)),
        ((1, 3), (2, 3)),
        ((7, 1000), (7, 1001)),
        ((1, 0), (2, 1)),
    ],
    ids=["sites", "later sites", "steps", "jitter sites", "both"],
)
def test_sites_and_steps_are_independent(one, other):
    x = draw(*one)
    y = draw(*other)
    count = x.size
    assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 5 / count**0.5
    pairs = np.bincount(
        (x.ravel() * 16).astype(int) * 16 + (y.ravel() * 16).astype(int), minlength=256
    )
    assert stats.chisquare(pairs).pvalue > 1e-4


def test_neighbours_are_independent():
    numbers = draw(3, 2)
    for x, y in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 5 / x.size**0.5


def test_the_same_key_gives_the_same_numbers():
    np.testing.assert_array_equal(draw(4, 2), draw(4, 2))


def test_dropout_zeroes_its_share_and_scales_the_rest():
    rate = 0.3
    rows, columns = draw_keys(1, 1, TOKENS, FEATURES)
    ones = np.ones((TOKENS, FEATURES))
    y = dropout(tensor(2 * ones), rate, (Tensor(rows), Tensor(columns)), 5).asnumpy()
    kept = y != 0
    assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / y.size) ** 0.5
    np.testing.assert_allclose(y[kept], 2 / (1 - rate), rtol=1e-6)
    np.testing.assert_array_equal(kept, draw(1, 5) >= rate)
