"""Capacities that change on the way: the sizes of LocMoE+'s bound, from token choice to expert
choice, compiled steps, resuming.
"""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import tiny

from pangu_locmoe.checkpoint.format import read_arrays
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.moe.capacity import (
    DROPLESS,
    RATIO,
    bound_capacity,
    capacity_bounds,
    drop_floor,
    dynamic_capacity,
    factor_capacity,
    initial_capacity,
    transition_capacity,
)
from pangu_locmoe.train.policies.capacity import Capacity
from pangu_locmoe.train.run import train
from pangu_locmoe.train.step import KEPT_STEPS, StepResult

HIDDEN = 256
EXPERTS = 8
TOKENS = 2048
UPPER = factor_capacity(1.25, TOKENS, EXPERTS)
SIZES = {math.ceil(UPPER / RATIO**k - 1e-9) for k in range(60)}


def bound(delta: float) -> float:
    return math.exp(HIDDEN * delta**2 / (2 - delta**2)) / EXPERTS


@given(st.floats(-1, 1), st.integers(1, UPPER), st.floats(0, 1))
def test_a_dynamic_capacity_is_the_next_size_above_the_bound(delta, now, hysteresis):
    wanted = min(max(bound(max(delta, 0)), 1.0), UPPER)
    got = dynamic_capacity(capacity_bounds(HIDDEN, EXPERTS, delta), UPPER, now, hysteresis)
    if abs(wanted - now) <= hysteresis * now * (1 - 1e-9):
        assert got == now
    elif abs(wanted - now) > hysteresis * now * (1 + 1e-9):
        assert got in SIZES and 1 <= got <= UPPER
        assert wanted * (1 - 1e-6) <= got <= math.ceil(wanted * RATIO * (1 + 1e-6))


def test_a_dynamic_capacity_in_numbers():
    """d = 256, n = 8: delta .2 gives e^(256 * .04 / 1.96) / 8 = 23.2, delta .22 gives 71.5;
    delta .25 gives more than all 320.
    """
    assert [round(bound(delta), 1) for delta in (0.2, 0.22)] == [23.2, 71.5]

    def after(delta, now, hysteresis=0.2):
        return dynamic_capacity(capacity_bounds(HIDDEN, EXPERTS, delta), 320, now, hysteresis)

    assert (after(0.2, 320), after(0.22, 320), after(0.25, 100), after(0.01, 320)) == (
        28,
        84,
        320,
        1,
    )
    # Off by less than a fifth of what it is: nothing changes; by more: it does, up or down.
    assert (after(0.22, 68), after(0.22, 89), after(0.22, 50), after(0.22, 91)) == (68, 89, 84, 84)
    assert (after(0.22, 68, 0.0), after(0.22, 84, 0.0)) == (84, 84)


def test_capacity_shrinks_by_halves():
    found = [transition_capacity(step, 8, TOKENS, UPPER) for step in range(10)]
    assert found == [DROPLESS, DROPLESS, DROPLESS, 1024, 1024, 1024, 512, 512, 320, 320]
    assert transition_capacity(0, 0, TOKENS, UPPER) == UPPER
    assert [transition_capacity(step, 4, 100, 100) for step in range(5)] == [100] * 5


def result_of(*deltas: float, loads_ILNE=None) -> StepResult:
    """One cosine for each layer; no load where none is given."""
    loads_ILNE = np.zeros((1, len(deltas), 1, 4), np.int64) if loads_ILNE is None else loads_ILNE
    load_LNE = loads_ILNE.sum(axis=0)
    return StepResult(
        {},
        0.0,
        load_LNE,
        load_LNE[:, 0],
        np.array(deltas)[:, None],
        np.zeros(1),
        loads_ILNE=loads_ILNE,
    )


def dropped(load_XE, capacity):
    return int(np.maximum(np.asarray(load_XE) - capacity, 0).sum())


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=3),
    st.floats(0, 1),
)
def test_the_floor_is_the_smallest_capacity_that_drops_no_more(load_XE, max_drop):
    load_XE = np.array(load_XE)
    tokens = int(load_XE.sum())
    floor = drop_floor(load_XE, tokens, max_drop)
    assert floor >= 1 and dropped(load_XE, floor) <= max_drop * tokens + 1e-6
    assert floor == 1 or dropped(load_XE, floor - 1) > max_drop * tokens - 1e-6


def test_a_floor_in_numbers():
    """Loads 60, 20, 10, 10: 54 slots drop 6, 44 drop 16; of 200 proposals of 100 tokens, 25
    slots of each of 4 experts hold 100.
    """
    load = np.array([[60, 20, 10, 10]])
    assert [drop_floor(load, 100, share) for share in (0.0, 0.06, 0.16, 0.4, 0.95, 1.0)] == [
        60,
        54,
        44,
        20,
        2,
        1,
    ]
    assert drop_floor(np.array([[50, 50, 50, 50]]), 100, 0.0) == 25
    # Two micro-batches, one even and one not: together they would look like 15 each.
    assert drop_floor(np.array([[20, 0], [10, 10]]), 40, 0.0) == 20


@given(st.floats(-1, 1), st.integers(1, 400), st.integers(1, UPPER), st.floats(0, 1))
def test_no_capacity_is_below_the_floor(delta, floor, now, hysteresis):
    bounds = capacity_bounds(HIDDEN, EXPERTS, delta)
    for found in (
        bound_capacity(bounds, UPPER, floor),
        dynamic_capacity(bounds, UPPER, now, hysteresis, floor),
    ):
        assert min(floor, UPPER) <= found <= UPPER


class Capacities:
    """What a policy sees of a stepper."""

    def __init__(self, config, num_tokens=TOKENS):
        start = initial_capacity(config.moe.capacity, num_tokens, EXPERTS)
        self.num_tokens = num_tokens
        self.capacities = (start,) * config.model.num_moe_layers

    def set_capacities(self, capacities):
        self.capacities = capacities


def follow(config, deltas, steps):
    """Capacities at first and after each step, and the events."""
    stepper = Capacities(config)
    policy = Capacity(config, stepper)
    first = stepper.capacities
    found = []
    events = []
    for step in range(1, steps + 1):
        events.extend(policy(step, result_of(*deltas(step))))
        assert policy.state() == {"capacities": list(stepper.capacities)}
        found.append(stepper.capacities)
    return first, found, events


def measured(config, result, num_tokens=TOKENS):
    """Capacities after the first step, and its event."""
    stepper = Capacities(config, num_tokens)
    (event,) = Capacity(config, stepper)(1, result)
    return stepper.capacities, event


def config_of(**moe):
    sizes = {"hidden_size": HIDDEN, "num_layers": 4, "num_moe_layers": 2}
    return tiny.tiny_config(model=sizes, moe={"num_experts": EXPERTS, **moe})


def test_each_layers_capacity_follows_its_own_cosines():
    config = config_of(
        capacity={"policy": "dynamic", "every": 2, "warmup_steps": 3, "statistic": "max"}
    )
    first, found, events = follow(config, lambda step: (0.2, 0.22 if step < 6 else 0.25), 6)
    assert first == (320, 320)
    assert found == [(320, 320)] * 3 + [(28, 84)] * 2 + [(28, 320)]
    assert [event["step"] for event in events] == [4, 6]
    assert [layer["layer"] for layer in events[0]["layers"]] == [1, 2]
    for layer, delta in zip(events[0]["layers"], (0.2, 0.22)):
        bounds = capacity_bounds(HIDDEN, EXPERTS, delta)
        assert (layer["delta"], layer["exact"], layer["erfc"], layer["exponential"]) == (
            delta,
            bounds.exact,
            bounds.erfc,
            bounds.exponential,
        )


def test_token_choice_comes_first_then_the_bound():
    choice = {"transition_steps": 6}
    config = config_of(
        router="locmoe_plus",
        token_choice=choice,
        capacity={"policy": "dynamic", "every": 4, "warmup_steps": 1, "statistic": "max"},
    )
    first, found, events = follow(config, lambda step: (0.2, 0.2), 8)
    assert first == (DROPLESS, DROPLESS)
    assert [one for one, _ in found] == [DROPLESS, 1024, 1024, 512, 512, 320, 320, 28]
    assert [event["event"] for event in events] == ["token_choice"] * 3 + ["capacity"]


def test_the_bound_is_still_measured_once():
    _, found, events = follow(
        config_of(capacity={"policy": "bound", "warmup_steps": 2}), lambda step: (0.01, 0.01), 5
    )
    assert found == [(320, 320)] + [(1, 1)] * 4 and [event["step"] for event in events] == [2]


def even_and_uneven() -> np.ndarray:
    """Two micro-batches of 2 x 1024 tokens from two nodes: even ones, and ones of which half go
    to expert 0 of each node's own.
    """
    even = np.full(EXPERTS, 128)
    uneven = np.array([576, *[64] * 7])
    return np.array([[[even, even]] * 2, [[even, uneven]] * 2])


@pytest.mark.parametrize("policy", ["bound", "dynamic"])
@pytest.mark.parametrize(
    ("num_tokens", "parts_XE"),
    [(2048, [[256] * 8, [704, *[192] * 7]]), (1024, [[128] * 8] * 3 + [[576, *[64] * 7]])],
    ids=["one group", "two groups, each in a node"],
)
@pytest.mark.parametrize("max_drop", [None, 0.02])
def test_drops_of_the_measured_step_stay_below_the_share(policy, num_tokens, parts_XE, max_drop):
    """The bound is 1: what is dropped at the step is counted by micro-batch and group."""
    config = config_of(
        router="locmoe",
        capacity={
            "policy": policy,
            "warmup_steps": 1,
            "factor": 8.0,
            "max_drop": max_drop,
            **({"every": 1} if policy == "dynamic" else {}),
        },
    )
    train = config.train.model_copy(update={"batch_size": 128, "accumulation_steps": 2})
    result = result_of(0.01, 0.01, loads_ILNE=even_and_uneven())
    now, event = measured(config.model_copy(update={"train": train}), result, num_tokens)
    share = 0.05 if max_drop is None else max_drop
    for capacity, layer in zip(now, event["layers"]):
        assert dropped(parts_XE, capacity) <= share * 4096 < dropped(parts_XE, layer["floor"] - 1)
        assert (
            layer["set_by"] == "max_drop"
            and layer["exact"] < 1
            and capacity == layer["capacity"] >= layer["floor"]
        )


def test_the_factor_is_the_ceiling_and_one_the_bound_alone():
    """All tokens to one expert would need 2,048 slots."""
    loads_ILNE = np.zeros((1, 2, 1, EXPERTS), np.int64)
    loads_ILNE[..., 0] = TOKENS
    result = result_of(0.01, 0.2, loads_ILNE=loads_ILNE)
    for max_drop, capacities, reasons in (
        (None, (320, 320), ["factor"] * 2),
        (1.0, (1, bound_capacity(capacity_bounds(HIDDEN, EXPERTS, 0.2), 320)), ["bound"] * 2),
    ):
        config = config_of(capacity={"policy": "bound", "warmup_steps": 1, "max_drop": max_drop})
        now, event = measured(config, result)
        assert now == capacities and [layer["set_by"] for layer in event["layers"]] == reasons


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_compiled_step_is_used_again(accumulation_steps):
    stepper = tiny.make_stepper(tiny.tiny_config(train={"accumulation_steps": accumulation_steps}))
    used = {}
    for capacity in (10, 20, 10, 30, 20):
        stepper.set_capacities((capacity,))
        assert stepper.capacities == (capacity,)
        assert used.setdefault(capacity, stepper._step) is stepper._step
    assert len(set(map(id, used.values()))) == 3
    # Only the latest are kept.
    for capacity in range(40, 40 + KEPT_STEPS - 1):
        stepper.set_capacities((capacity,))
    stepper.set_capacities((20,))
    assert used[20] is stepper._step
    stepper.set_capacities((10,))
    assert used[10] is not stepper._step


@pytest.mark.slow
def test_going_back_to_a_size_compiles_nothing_and_changes_nothing():
    """Steps with capacities 40, 20, 40 give what a stepper gives that knows each from the start."""
    config = tiny.tiny_config(moe={"router": "locmoe_plus", "capacity": {"factor": 1.0}})

    def run(forget):
        stepper = tiny.make_stepper(config)
        batches = tiny.batches(config, prepare(config, False))
        results = []
        for number, capacity in enumerate((40, 20, 40), 1):
            if forget:
                stepper._steps.clear()
            stepper.set_capacities((capacity,))
            results.append(stepper(next(batches), number, 0.003))
        return tiny.losses(results), [result.dropped_LE.tolist() for result in results]

    (one, dropped), (other, again) = run(False), run(True)
    np.testing.assert_array_equal(one, other)
    assert dropped == again and dropped[1] != dropped[0]


def test_a_resumed_run_has_the_same_capacities_and_numbers(tmp_path):
    """From a checkpoint in the middle of the transition, through the measurements after it."""
    config = tiny.tiny_config(
        moe={
            "router": "locmoe_plus",
            "token_choice": {"threshold": 0.6, "max_experts": 2, "transition_steps": 5},
            "capacity": {
                "policy": "dynamic",
                "every": 3,
                "warmup_steps": 1,
                "statistic": 0.1,
                "hysteresis": 0.0,
                "max_drop": 0.5,
            },
        },
        parallel={"nodes": 2},
        train={"steps": 8, "mode": "pynative", "learning_rate": 0.003},
        evaluation={"every": 8, "sequences": 1},
        checkpoint={"every": 4, "keep": 5},
    )
    assert train(config, tmp_path / "whole", progress=False) is None
    rows = tiny.rows(tmp_path / "whole")
    capacities = [row["capacity"] for row in rows if "loss" in row]
    assert capacities[:6] == [None, None, None, 128, 128, 80] and capacities[-1] < 80
    routed = [row["experts_per_token"] for row in rows if "loss" in row]
    assert all(1 < number <= 2 for number in routed)
    trace = tiny.trace(tmp_path / "whole")
    np.testing.assert_allclose(trace["load"].sum((1, 2)) / 256, routed)
    unrouted = [row["unrouted_fraction"] for row in rows if "loss" in row]
    assert unrouted[:3] == [0, 0, 0] and max(unrouted) > 0
    run_dir = tmp_path / "resumed"
    last = "step-00000008"
    shutil.copytree(tmp_path / "whole", run_dir)
    shutil.rmtree(run_dir / "checkpoints" / last)
    assert train(config, run_dir, resume=True, progress=False) is None
    assert tiny.rows(run_dir) == rows
    for file in ("model.safetensors", "optimizer.safetensors"):
        wanted = read_arrays(tmp_path / "whole" / "checkpoints" / last / file)
        for name, array in read_arrays(run_dir / "checkpoints" / last / file).items():
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)
