"""LocMoE's bound against mpmath at 50 digits, and the policies."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from pangu_locmoe.config import CapacityConfig
from pangu_locmoe.moe.capacity import (
    DROPLESS,
    CapacityBounds,
    bound_capacity,
    capacity_bounds,
    cosine_statistic,
    factor_capacity,
    initial_capacity,
)

MAX_DOUBLE = 1.7e308


@pytest.mark.parametrize(
    ("cosine", "probability", "exact", "erfc", "exponential"),
    [
        (0.03, 0.0318, 1.96, 1.97, 0.63),
        (0.04, None, 14.9, None, 3.8),
        (0.05, None, 181, None, 37.9),
        (5120**-0.5, 0.317, 0.197, None, None),
    ],
)
def test_reference_values(cosine, probability, exact, erfc, exponential):
    """d = 5120, n = 16, to the digits printed."""
    bounds = capacity_bounds(5120, 16, cosine)
    for got, printed in (
        (bounds.probability, probability),
        (bounds.exact, exact),
        (bounds.erfc, erfc),
        (bounds.exponential, exponential),
    ):
        if printed is not None:
            digits = len(str(printed).replace(".", "").lstrip("0"))
            assert float(f"{got:.{digits}g}") == printed


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 8192), st.integers(1, 640), st.floats(1e-4, 0.999))
def test_bounds_at_fifty_digits(d, n, delta):
    bounds = capacity_bounds(d, n, delta)
    with mpmath.workdps(50):
        square = mpmath.mpf(delta) ** 2
        # 1 - I_x(a, b) = I_{1-x}(b, a), without cancellation
        probability = mpmath.betainc(
            mpmath.mpf(d - 1) / 2, mpmath.mpf(1) / 2, 0, 1 - square, regularized=True
        )
        exponent = square * d / (2 - square)
        wanted = (
            1 / (n * probability),
            1 / (n * mpmath.erfc(mpmath.sqrt(exponent))),
            mpmath.exp(exponent) / n,
        )
        # delta^2 is a double: its last place grows by the logarithmic slope of each form
        slack = (d * square / (1 - square), exponent, exponent)
        for got, value, amplified in zip(
            (bounds.exact, bounds.erfc, bounds.exponential), wanted, slack
        ):
            if value > 1e300:
                assert got > 1e290  # infinity, or the last doubles before it
            else:
                assert abs(got / value - 1) < 1e-12 + 1e-15 * float(amplified)
        if probability > 1e-300:
            assert abs(bounds.probability / probability - 1) < 1e-12 + 1e-15 * float(slack[0])
    assert bounds.exponential <= bounds.erfc


@pytest.mark.parametrize("d", [2, 3, 16, 5120])
def test_the_probability_is_that_of_a_random_direction(d):
    """A squared cosine to a fixed direction is Beta(1/2, (d-1)/2)."""
    delta = d**-0.5
    bounds = capacity_bounds(d, 4, delta)
    assert bounds.probability == pytest.approx(stats.beta(0.5, (d - 1) / 2).sf(delta**2), rel=1e-12)
    assert bounds.probability == pytest.approx(
        1 - special.betainc(0.5, (d - 1) / 2, delta**2), rel=1e-12
    )


def test_closed_forms_in_two_and_three_dimensions():
    # a circle: |angle| within acos(delta) of the line; a sphere: Archimedes' hat-box
    assert capacity_bounds(2, 1, 0.3).probability == pytest.approx(
        math.acos(0.3) * 2 / math.pi, rel=1e-13
    )
    assert capacity_bounds(3, 1, 0.3).probability == pytest.approx(0.7, rel=1e-13)


@pytest.mark.parametrize("cosine", [0.0, -0.3, -1.0])
def test_without_an_angle_every_token_belongs(cosine):
    assert capacity_bounds(64, 8, cosine) == CapacityBounds(cosine, 1.0, 1 / 8, 1 / 8, 1 / 8)


@pytest.mark.parametrize(("d", "cosine"), [(5120, 1.0), (5120, 0.9), (10**6, 0.5), (2, 1.0)])
def test_what_a_double_cannot_hold_is_infinity_not_nan(d, cosine):
    bounds = capacity_bounds(d, 16, cosine)
    assert bounds.exact == math.inf
    assert not math.isnan(bounds.erfc) and not math.isnan(bounds.exponential)
    if d > 10**3:
        assert bounds.erfc == bounds.exponential == math.inf


def test_on_a_line_every_token_belongs():
    assert capacity_bounds(1, 2, 1.0).exact == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0.1), "hidden_size"),
        ((8, 0, 0.1), "num_experts"),
        ((8, 4, 1.01), "cosine"),
        ((8, 4, -1.01), "cosine"),
        ((8, 4, math.nan), "nan"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        capacity_bounds(*arguments)


@pytest.mark.parametrize(
    ("factor", "tokens", "experts", "wanted"),
    [
        (1.1, 160, 16, 11),
        (1.1, 200, 20, 11),  # 11.000000000000002 in floating point
        (1.1, 400, 4, 110),  # 110.00000000000001
        (1.25, 2048, 8, 320),
        (1.25, 10, 4, 4),  # 3.125
        (1.0, 7, 8, 1),
        (1.0, 1, 640, 1),
        (1.0, 16, 5, 4),  # 3.2
        (2.0, 3, 1, 6),
    ],
)
def test_factor_capacity(factor, tokens, experts, wanted):
    assert factor_capacity(factor, tokens, experts) == wanted


@given(st.integers(100, 800), st.integers(1, 100), st.integers(1, 640), st.booleans())
def test_factor_capacity_is_the_exact_ceiling(hundredths, share, experts, whole):
    """Where the quotient is a whole number, and just beside it."""
    tokens = 100 * share * experts + (0 if whole else 1)
    assert factor_capacity(hundredths / 100, tokens, experts) == math.ceil(
        Fraction(hundredths * tokens, 100 * experts)
    )


@pytest.mark.parametrize(
    ("exact", "wanted"),
    [
        (0.06, 1),
        (1.0, 1),
        (1.96, 2),
        (14.9, 15),
        (39.9, 40),
        (40.0, 40),
        (40.1, 40),
        (math.inf, 40),
    ],
)
def test_bound_capacity_is_rounded_up_and_clamped(exact, wanted):
    assert bound_capacity(CapacityBounds(0.1, 0.1, exact, 0.0, 0.0), upper=40) == wanted


@pytest.mark.parametrize(
    ("statistic", "wanted"),
    [
        ("min", -0.2),
        ("median", 0.15),
        ("mean", 0.2),
        ("max", 0.7),
        (0.0, -0.2),
        (0.5, 0.15),
        (1.0, 0.7),
        (0.25, 0.025),
    ],
)
def test_cosine_statistic(statistic, wanted):
    assert cosine_statistic(np.array([0.7, 0.1, -0.2, 0.2]), statistic) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("settings_", "tokens", "wanted"),
    [
        ({"policy": "dropless"}, 64, DROPLESS),
        ({"policy": "factor", "factor": 1.25}, 64, 20),
        ({"policy": "bound", "factor": 2.0}, 64, 32),
        ({"policy": "factor", "factor": 8.0}, 64, 64),  # never more slots than tokens
        ({"policy": "factor", "factor": 1.0}, 2, 1),
    ],
)
def test_initial_capacity(settings_, tokens, wanted):
    assert initial_capacity(CapacityConfig(**settings_), tokens, 4) == wanted
