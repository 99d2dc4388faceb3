"""Intervals from blocks of documents against closed forms, a bootstrap, and how often they hold
the truth.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from study.documents import UNKNOWN, loss_table, note, on_other_documents

from pangu_locmoe.train.intervals import MOST_BLOCKS, difference, in_blocks, interval, mean_of


def documents(seed: int, count: int = 200, noise: float = 0.5) -> np.ndarray:
    """[nats, tokens] of documents of different lengths, each with a loss of its own around 3."""
    rng = np.random.default_rng(seed)
    tokens_D = rng.integers(5, 200, count)
    return np.stack([rng.normal(3, noise, count) * tokens_D, tokens_D], axis=1)


def one_domain(sums: np.ndarray) -> dict:
    return {"en": {"weight": 1, "sums": sums.tolist()}}


def test_equal_documents_give_students_interval_of_their_mean():
    losses = np.random.default_rng(1).normal(3, 1, 20)
    wanted = stats.t.interval(0.95, 19, losses.mean(), stats.sem(losses))
    assert interval(one_domain(np.stack([losses * 10, np.full(20, 10)], axis=1))) == pytest.approx(
        wanted
    )


def test_documents_of_different_lengths_against_a_bootstrap():
    sums = documents(2)
    draws = np.random.default_rng(3).integers(0, len(sums), (4000, len(sums)))
    nats, tokens = sums[draws].sum(axis=1).T
    low, high = interval(one_domain(sums))
    assert (low, high) == pytest.approx(
        np.quantile(nats / tokens, [0.025, 0.975]), abs=0.1 * (high - low)
    )


def test_the_truth_is_inside_as_often_as_promised():
    inside = 0
    for seed in range(400):
        low, high = interval(one_domain(np.array(in_blocks(documents(seed, 40)))))
        inside += low <= 3 <= high
    assert 0.91 <= inside / 400 <= 0.985


def test_domains_add_up_by_their_weight():
    blocks = {
        name: {"weight": weight, "sums": documents(seed).tolist()}
        for seed, (name, weight) in enumerate((("en", 3), ("zh", 1)))
    }
    half = {name: np.ptp(interval({name: domain})) / 2 for name, domain in blocks.items()}
    got = np.ptp(interval(blocks)) / 2
    assert got == pytest.approx(np.hypot(0.75 * half["en"], 0.25 * half["zh"]), rel=0.02)
    assert interval({**blocks, "code": {"weight": 1, "sums": [[3.0, 1]]}}) is None


def test_blocks_hold_all_documents_in_order():
    sums = documents(4, 100)
    sums[7] = 0
    blocks = np.array(in_blocks(sums))
    assert len(blocks) == MOST_BLOCKS and blocks.sum(axis=0) == pytest.approx(sums.sum(axis=0))
    assert blocks[0] == pytest.approx(sums[:4].sum(axis=0), abs=1e-3)
    assert len(in_blocks(sums[:5])) == 5


def test_a_gap_between_two_models_is_surer_than_their_losses():
    """Both are measured on the same documents, so what is hard for both cancels."""
    first = one_domain(documents(5))
    second = {
        "en": {
            **first["en"],
            "sums": [[nats - 0.1 * tokens, tokens] for nats, tokens in first["en"]["sums"]],
        }
    }
    assert interval(difference(first, second)) == pytest.approx((0.1, 0.1))
    assert np.ptp(interval(first)) > 0.1
    assert interval(mean_of([first, second])) == pytest.approx(
        np.mean([interval(first), interval(second)], axis=0)
    )
    with pytest.raises(ValueError, match="different text"):
        difference(first, one_domain(documents(6)))


def test_a_table_has_both_spreads_or_says_what_records_them():
    blocks = [one_domain(documents(seed)) for seed in (7, 7)]
    models = {
        "hash": [{"seed": 1, "loss": 3.0, "blocks": blocks[0]}],
        "switch": [{"seed": 1, "loss": 3.25, "blocks": blocks[1]}],
    }
    text = loss_table(models, "hash")
    low, high = interval(blocks[0])
    assert f"| switch | 3.250 | {low:.3f} to {high:.3f} | +0.250 | +0.000 to +0.000 |" in text
    del models["switch"][0]["blocks"]
    assert f"| switch | 3.250 | {UNKNOWN} | +0.250 | {UNKNOWN} |" in loss_table(models, "hash")
    assert note("training", [{"validation": [], "blocks": {}}, {"times": []}]) == ""
    assert "`bash scripts/reproduce.sh --again training` measures" in note(
        "training", [{"validation": []}]
    )
    assert (
        on_other_documents([blocks[0]], less=[one_domain(documents(8))])
        == "measured on different text"
    )
