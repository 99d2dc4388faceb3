"""The state rule: against traces whose transient is known to end, to have ended or to go on, and
against its statistics by hand.
"""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_locmoe.expert_load.state import StateRule, states
from pangu_locmoe.expert_load.trace import Trace
from pangu_locmoe.expert_load.windows import SIGMAS, UNLIKE, Windows, tail
from pangu_locmoe.report.expert_load.plots import plot_states

STEPS = 3000


def softmax(logits):
    power = np.exp(logits - logits.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def sampled(random, share_WLE, tokens: int, stride: int = 1) -> Trace:
    share_WLE = share_WLE[::stride]
    return Trace(1 + stride * np.arange(len(share_WLE)), random.multinomial(tokens, share_WLE))


def switching(
    seed: int,
    end: int,
    tokens: int,
    experts: int,
    stride: int = 1,
    kind: str = "walk",
    size: float = 0.1,
    layers: int = 4,
) -> Trace:
    """Until step `end` the logits walk (between walls at 1.5, so that no expert takes all) or
    jump about their mean; then they stand.
    """
    random = np.random.default_rng(seed)
    start_LE = random.normal(0, 0.5, (layers, experts))
    noise_WLE = random.normal(0, size, (end, layers, experts))
    logits_WLE = start_LE + (np.cumsum(noise_WLE, 0) if kind == "walk" else noise_WLE)
    logits_WLE = np.abs((logits_WLE + 1.5) % 6 - 3) - 1.5
    rest_LE = logits_WLE[-1] if kind == "walk" else start_LE
    return sampled(
        random,
        softmax(
            np.concatenate([logits_WLE, np.broadcast_to(rest_LE, (STEPS - end, layers, experts))])
        ),
        tokens,
        stride,
    )


def of_documents(
    seed: int, rows: int, layers: int, experts: int, documents: int, length: int
) -> Trace:
    """Every step holds a few documents of four domains; a domain, and within it a document,
    prefers some experts.
    """
    random = np.random.default_rng(seed)
    domain_LJE = softmax(random.normal(0, 0.8, (layers, 4, experts)))
    load_WLE = np.zeros((rows, layers, experts), int)
    for step in range(rows):
        weight_LIE = random.gamma(30 * domain_LJE[:, random.integers(0, 4, documents)] + 1e-9)
        load_WLE[step] = random.multinomial(
            length, weight_LIE / weight_LIE.sum(-1, keepdims=True)
        ).sum(1)
    return Trace(np.arange(1, rows + 1), load_WLE)


@pytest.mark.parametrize("end", [500, 1000, 2000])
@pytest.mark.parametrize(
    "kind, size, tokens, experts, stride",
    [
        ("walk", 0.1, 500, 4, 1),
        ("walk", 0.1, 500, 64, 1),
        ("walk", 0.1, 1536, 16, 1),
        ("walk", 0.05, 100_000, 64, 1),
        ("walk", 0.3, 500, 4, 1),
        ("walk", 0.3, 100_000, 8, 1),
        ("walk", 0.1, 4096, 32, 5),
        ("walk", 0.1, 4096, 16, 10),
        ("walk", 0.3, 500, 32, 10),
        ("jumps", 0.3, 500, 4, 1),
        ("jumps", 0.3, 1536, 16, 1),
        ("jumps", 0.3, 100_000, 64, 10),
        ("jumps", 1.0, 500, 64, 1),
        ("jumps", 1.0, 4096, 16, 5),
    ],
)
def test_the_end_of_the_transient_is_found_within_a_tenth(end, kind, size, tokens, experts, stride):
    found = states(switching(end + experts, end, tokens, experts, stride, kind, size))
    for step in (*found.layers_stable_from, found.stable_from):
        assert step is not None and abs(step - end) <= 0.1 * end


@pytest.mark.parametrize(
    "tokens, experts", [(500, 4), (500, 64), (1536, 16), (100_000, 4), (100_000, 64)]
)
def test_no_false_alarm_on_stationary_traces(tokens, experts):
    """50 independent series each; stable from the first step, known as soon as it can be, and
    never lost.
    """
    random = np.random.default_rng(tokens + experts)
    share_1LE = softmax(random.normal(0, 0.7, (1, 50, experts)))
    found = states(
        sampled(random, np.repeat(share_1LE, 1000 if experts == 64 else 2000, axis=0), tokens)
    )
    needed = found.window + found.hold - 1
    assert found.layers_stable_from == (1,) * 50
    assert not found.stable_WL[: needed - 1].any() and found.stable_WL[needed - 1 :].all()


@pytest.mark.parametrize("experts, documents", [(16, 12), (8, 6), (4, 5)])
def test_no_false_alarm_where_documents_make_more_noise_than_sampling(experts, documents):
    trace = of_documents(experts, 1000, 16, experts, documents, 128)
    found = states(trace)
    share_WLE = trace.share_WLE
    variance = share_WLE.var(0).sum(1)
    sampling = (share_WLE.mean(0) * (1 - share_WLE.mean(0))).sum(1) / (128 * documents)
    assert (variance > 4 * sampling).all()  # the noise is really there
    assert found.stable_from == 1 and found.stable_WL[74:].all()


@pytest.mark.parametrize(
    "kind, size, tokens",
    [("walk", 0.1, 500), ("walk", 0.05, 100_000), ("jumps", 1.0, 500), ("jumps", 1.0, 100_000)],
)
def test_a_trace_that_never_settles_is_transient(kind, size, tokens):
    found = states(switching(7, STEPS, tokens, 16, kind=kind, size=size))
    assert found.stable_from is None and found.layers_stable_from.count(None) == 4
    assert "transient at the last step, 3000" in found.format()


def test_one_unsettled_layer_makes_the_model_transient():
    calm = switching(1, 500, 4096, 16, layers=2)
    wild = switching(2, STEPS, 4096, 16, layers=1)
    found = states(Trace(calm.step_W, np.concatenate([calm.load_WLE, wild.load_WLE], axis=1)))
    assert (
        found.stable_from is None
        and found.layers_stable_from[2] is None
        and None not in found.layers_stable_from[:2]
    )


def drifting(per_row: float, rows: int) -> Trace:
    """An even half of eight experts gains what the other loses, `per_row` of its share each row;
    1e6 tokens: hardly any noise.
    """
    drift_W1 = (per_row * np.arange(rows))[:, None, None]
    return sampled(
        np.random.default_rng(0), (1 + drift_W1 * np.tile([1.0, -1.0], 4)) / 8, 1_000_000
    )


def test_which_drift_is_tolerated():
    """The halves of a window, 25 rows apart, may differ by the tolerance: 5 % of a share.

    Noise may hide a little more, not twice as much.
    """
    slow = states(drifting(0.9 * 0.05 / 25, 490))
    assert slow.stable_WL[73:].all() and slow.stable_from <= 25
    fast = states(drifting(1.2 * 0.05 / 25, 150))
    assert fast.stable_from is None and not fast.stable_WL.any()
    assert states(drifting(1.2 * 0.05 / 25, 150), tolerance=0.1).stable_WL[73:].all()


def test_hysteresis_a_stable_layer_needs_more_to_become_transient():
    """Drift 1.5 times the tolerance is (1.5)^2 = 2.25 of the limit, above EXIT 2; 1.3 times is
    1.7: enough not to enter, not to leave.
    """
    still = np.zeros((300, 1, 1))
    for factor, stays in ((1.3, True), (1.5, False)):
        ramp = factor * 0.05 / 25 * np.arange(1, 201)[:, None, None]
        share_WLE = (1 + np.concatenate([still, ramp]) * np.tile([1.0, -1.0], 4)) / 8
        found = states(sampled(np.random.default_rng(1), share_WLE, 10**9))
        assert bool(found.stable_WL[-1, 0]) == stays and found.stable_WL[299, 0]
        assert (found.stable_from == 1) == stays
        assert not states(
            Trace(
                np.arange(200), sampled(np.random.default_rng(1), share_WLE[300:], 10**9).load_WLE
            )
        ).stable_WL.any()


def test_a_disturbance_ends_the_spell_and_the_next_begins_after_it():
    random = np.random.default_rng(3)
    share_WLE = np.repeat(softmax(random.normal(0, 0.3, (1, 1, 16))), 1500, axis=0)
    share_WLE[700:800] = softmax(np.log(share_WLE[700:800]) + random.normal(0, 1, (100, 1, 16)))
    found = states(sampled(random, share_WLE, 4096))
    assert (
        found.stable_WL[699, 0]
        and not found.stable_WL[720:860, 0].any()
        and abs(found.stable_from - 801) <= 5
    )


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_online_is_offline_however_the_rows_are_cut(data):
    """Row by row, in blocks, at once: equal to the last bit; and no later row changes what was
    said.
    """
    end = data.draw(st.integers(30, 150))
    experts = data.draw(st.integers(1, 9))
    window = data.draw(st.integers(4, 40))
    hold = data.draw(st.one_of(st.none(), st.integers(1, 30)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits_WLE = np.concatenate(
        [random.normal(0, 1, (end, 2, experts)), np.zeros((200 - end, 2, experts))]
    )
    trace = sampled(
        random,
        softmax(logits_WLE),
        data.draw(st.sampled_from([0, 3, 500])),
        1 + data.draw(st.integers(0, 2)),
    )
    whole = states(trace, window, hold=hold)

    rule = StateRule(window, hold=hold)
    verdicts = []
    for step, load_LE in zip(trace.step_W, trace.load_WLE):
        verdicts.append(rule.update(int(step), load_LE))
    assert [
        [start is not None for start in verdict.layers_stable_from] for verdict in verdicts
    ] == whole.stable_WL.tolist()
    assert (verdicts[-1].stable_from, verdicts[-1].layers_stable_from) == (
        whole.stable_from,
        whole.layers_stable_from,
    )

    cuts = sorted(data.draw(st.lists(st.integers(0, len(trace.step_W)), max_size=5)))
    rule = StateRule(window, hold=hold)
    parts = [
        rule.extend(trace.step_W[a:b], trace.load_WLE[a:b])
        for a, b in zip([0, *cuts], [*cuts, len(trace.step_W)])
    ]
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), whole.statistic_WL)
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), whole.stable_WL)

    rows = data.draw(st.integers(1, len(trace.step_W)))
    early = states(Trace(trace.step_W[:rows], trace.load_WLE[:rows]), window, hold=hold)
    np.testing.assert_array_equal(early.statistic_WL, whole.statistic_WL[:rows])
    assert early.layers_stable_from == verdicts[rows - 1].layers_stable_from


def by_hand(load_WE: np.ndarray, tolerance: float) -> tuple[float, float, float, float]:
    """jump, spread, drift and range of one window, from their definitions."""
    window, experts = load_WE.shape
    x_WE = load_WE / load_WE.sum(1, keepdims=True)
    p_E = x_WE.mean(0)
    inverse = (1 / load_WE.sum(1)).mean()
    covariance_EE = np.diag(p_E) - np.outer(p_E, p_E)
    sampling = np.trace(covariance_EE) * inverse
    step_E = (np.diff(x_WE, axis=0) ** 2).mean(0) / 2
    over = max(1, step_E.sum() / sampling)
    directions = np.trace(covariance_EE) ** 2 / (covariance_EE**2).sum()
    freedom = max(1, 1 / (1 / (over**2 * max(1, directions)) + (1 - 1 / over) ** 2))
    scale_E = np.maximum(p_E, 1 / experts)
    slack = tolerance**2 * (scale_E**2).sum()
    noise = over * sampling
    half = window // 2
    jump = np.sqrt((noise - sampling) / (scale_E**2).sum()) / UNLIKE
    spread = x_WE.var(0, ddof=1).sum() / (noise * tail((window - 1) * freedom) + slack)
    drift = ((x_WE[-half:].mean(0) - x_WE[:half].mean(0)) ** 2).sum() / (
        2 / half * noise * tail(freedom) + slack
    )
    bound = np.log(window**2 * experts) + SIGMAS**2 / 2
    own_E = np.maximum(step_E, over * inverse * p_E * (1 - p_E)) + (tolerance * scale_E) ** 2
    return (
        jump,
        spread,
        drift,
        float(
            (
                (x_WE.max(0) - x_WE.min(0))
                / (2 * np.sqrt(bound * own_E) + bound / 3 * over * inverse)
            ).max()
        ),
    )


@pytest.mark.parametrize(
    "window, kind", [(10, "still"), (11, "jumps"), (16, "walk"), (50, "trend"), (7, "spike")]
)
def test_the_statistic_is_the_largest_of_the_four_by_definition(window, kind):
    random = np.random.default_rng(window)
    logits_WE = (
        random.normal(0, 1, (1, 6))
        + {
            "still": np.zeros((120, 6)),
            "jumps": random.normal(0, 1, (120, 6)),
            "walk": np.cumsum(random.normal(0, 0.3, (120, 6)), axis=0),
            "trend": 0.05 * np.arange(120)[:, None] * np.arange(6),
            "spike": 5.0 * (np.arange(120) % 60 == 30)[:, None] * (np.arange(6) == 1),
        }[kind]
    )
    load_WE = random.multinomial(random.integers(300, 3000, 120), softmax(logits_WE))
    block = Windows(window, 0.07, window).push(load_WE[:, None])
    assert np.isnan(block.statistic_WL[: window - 1]).all()
    expected = [
        max(by_hand(load_WE[row - window + 1 : row + 1], 0.07)) for row in range(window - 1, 120)
    ]
    np.testing.assert_allclose(block.statistic_WL[window - 1 :, 0], expected, rtol=1e-8)


def test_the_tail_is_that_of_chi_squared():
    """The 99.865 % quantile (three sigmas) of 200,000 draws, over the degrees of freedom."""
    random = np.random.default_rng(0)
    for freedom in (1, 3, 15, 735):
        assert tail(freedom) == pytest.approx(
            np.quantile(random.chisquare(freedom, 200_000), 0.99865) / freedom, rel=0.05
        )


@pytest.mark.parametrize("rows", [0, 1, 49, 73])
def test_short_traces_cannot_tell(rows):
    trace = Trace(10 * np.arange(rows), np.full((rows, 2, 4), 100))
    found = states(trace)
    assert (
        found.stable_from is None
        and found.layers_stable_from == (None, None)
        and found.statistic_WL.shape == (rows, 2)
    )
    assert (
        found.format()
        == f"too short to tell: {rows} row{'' if rows == 1 else 's'}, the rule needs 74"
    )
    assert (found.known, found.told, found.state, found.layer_states) == (
        False,
        None,
        "unknown",
        ("unknown",) * 2,
    )
    assert (found.to_dict()["state"], found.to_dict()["layer_states"]) == (
        "unknown",
        ["unknown"] * 2,
    )
    assert json.loads(json.dumps(found.to_dict()))["steps"]["rows"] == rows


def test_the_shortest_trace_that_is_stable():
    found = states(Trace(10 * np.arange(74), np.full((74, 2, 4), 100)))
    assert found.stable_from == 0 and found.stable_WL[:, 0].tolist() == [False] * 73 + [True]
    assert found.told == (0, 0) and found.state == "stable"


def test_dead_experts_single_experts_and_empty_layers():
    load_WLE = np.zeros((100, 3, 4), int)
    load_WLE[:, 0, 1] = 50  # one expert gets all
    load_WLE[:, 1] = [10, 0, 20, 0]
    assert states(Trace(np.arange(100), load_WLE)).layers_stable_from == (0, 0, 0)
    assert states(Trace(np.arange(100), load_WLE[:, :1, 1:2])).stable_from == 0
    assert states(Trace(np.arange(100), load_WLE[:, :0])).stable_from is None


def test_what_is_said_in_words_and_numbers():
    found = states(switching(5, 500, 4096, 16, stride=2, layers=2))
    first, second = found.layers_stable_from
    assert found.format().splitlines() == [
        f"stable from step {max(first, second)} of 2999",
        f"  MoE layer 0: stable from step {first}",
        f"  MoE layer 1: stable from step {second}",
        "window 50 rows of 2 steps, tolerance 5 % of a share",
    ]
    said = json.loads(json.dumps(found.to_dict()))
    assert (
        said["layers_stable_from"] == [first, second]
        and said["stable_from"] == max(first, second)
        and said["window"] == 50
    )
    assert (
        said["steps"] == {"first": 1, "last": 2999, "rows": 1500, "stride": 2}
        and said["rule"]["hold"] == 25
    )


def test_wrong_arguments_and_rows_are_refused():
    for arguments in ({"window": 3}, {"hold": 0}, {"tolerance": -0.1}, {"tolerance": np.nan}):
        with pytest.raises(ValueError, match="must be 4 or more"):
            StateRule(**arguments)
    rule = StateRule()
    with pytest.raises(ValueError, match="no row yet"):
        rule.verdict()
    assert rule.update(5, np.ones((2, 4), int)).layers_stable_from == (None, None)
    with pytest.raises(ValueError, match="steps must rise"):
        rule.update(5, np.ones((2, 4), int))
    with pytest.raises(ValueError, match=r"load has shape \(2, 5\), the rows before have \(2, 4\)"):
        rule.update(6, np.ones((2, 5), int))


def test_a_large_trace_takes_less_than_a_second():
    load_WLE = np.random.default_rng(0).integers(0, 100, (2400, 24, 64))
    began = time.process_time()
    states(Trace(np.arange(2400), load_WLE))
    assert time.process_time() - began < 1.5  # 0.5 s here; the rest is for a busy machine


def test_the_picture_shades_the_transient(tmp_path):
    trace = switching(5, 500, 4096, 16, layers=3)
    for name, part in (("whole", trace), ("short", trace.between(0, 40))):
        found = states(part)
        plot_states(part, found, tmp_path / f"{name}.svg")
        svg = (tmp_path / f"{name}.svg").read_text()
        assert svg.count('id="transient-') == 3 * (name == "whole") and len(svg) < 2_000_000
        says = (
            f"stable from step {step}"
            if step
            else "transient"
            if name == "whole"
            else "too short to tell"
            for step in found.layers_stable_from
        )
        assert all(f"MoE layer {layer}: {text}" in svg for layer, text in enumerate(says))
