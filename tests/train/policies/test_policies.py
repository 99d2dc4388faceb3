"""What all policies have in common: their shape, and the keys of the checkpoint, which must
stay.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.small import small_config

from pangu_locmoe.moe.slot_factors import EVERY, next_factors, starting_factors
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.topology import Topology
from pangu_locmoe.parallel.world import World
from pangu_locmoe.train.policies import make_policies
from pangu_locmoe.train.policies.capacity import Capacity
from pangu_locmoe.train.policies.placement import Placement
from pangu_locmoe.train.policies.slot_factors import SlotFactors

PARALLEL = {"expert_parallel": 2, "nodes": 2}
TOPOLOGY = Topology(2, 1, 2, 4)


class OnPaper:
    """What policies see of a stepper: the rank of a job where it has an exchange."""

    def __init__(self, config, exchange=None):
        self.world = World(SingleProcess(), TOPOLOGY, exchange)
        self.num_tokens = 32
        self.capacities = (10,)
        self.factors = starting_factors(config.moe.capacity)
        self.expert_of_slot_LP = np.arange(4)[None]
        self.model = SimpleNamespace(
            moe_layers={
                "blocks.1.moe": SimpleNamespace(
                    transport=SimpleNamespace(set_placement=self.set_placement)
                )
            }
        )

    def set_placement(self, expert_of_slot_P):
        self.expert_of_slot_LP = expert_of_slot_P[None]

    def move_experts(self, next_expert_of_slot_LP):
        self.expert_of_slot_LP = np.asarray(next_expert_of_slot_LP)

    def set_capacities(self, capacities):
        self.capacities = capacities

    def set_factors(self, factors):
        self.factors = factors


def no_trace():
    raise AssertionError("nobody asks for the trace")


def static(**capacity):
    return small_config(parallel={**PARALLEL, "sizes": "static"}, moe={"capacity": capacity})


def test_a_run_has_the_policies_that_it_asks_for():
    auto = static(local_factor="auto", remote_factor=0.5)
    placed = small_config(parallel=PARALLEL, placement={"policy": "eplb"})
    exchange = SimpleNamespace()
    for config, wanted in (
        (small_config(), [Capacity]),
        (small_config(model={"num_moe_layers": 0}), [Capacity]),
        (static(local_factor=2.0, remote_factor=0.5), [Capacity]),
        (auto, [Capacity, SlotFactors]),
        (placed, [Capacity, Placement]),
        (small_config(moe={"router": "hash", "balance": "bias"}), [Capacity]),
        (small_config(moe={"balance": "bias"}, model={"num_moe_layers": 0}), [Capacity]),
    ):
        assert [
            type(one) for one in make_policies(config, OnPaper(config, exchange), no_trace)
        ] == wanted
    # A single process has no slots for others, and nowhere to move experts to.
    assert [type(one) for one in make_policies(auto, OnPaper(auto), no_trace)] == [Capacity]


def test_slot_factors_follow_the_counts_of_every_twentieth_step():
    config = static(local_factor="auto", remote_factor=0.5)
    stepper = OnPaper(config, SimpleNamespace())
    policy = SlotFactors(config, stepper)
    before = stepper.factors
    load_LNE = np.array([[[16, 16, 0, 0], [0, 0, 16, 16]]])
    result = SimpleNamespace(load_LNE=load_LNE)
    assert list(policy(EVERY - 1, result)) == [] and stepper.factors is before
    wanted = next_factors(config.moe.capacity, before, load_LNE, TOPOLOGY, 32)
    (row,) = policy(EVERY, result)
    assert row == {
        "step": EVERY,
        "event": "slots",
        "local_factor": wanted.local_factor,
        "remote_factor": 0.5,
    }
    assert stepper.factors == wanted != before
    assert list(policy(2 * EVERY, result)) == []  # they fit


@pytest.mark.parametrize("start", [None, [[3, 2, 1, 0]]])
def test_experts_begin_where_they_are_put(start):
    config = small_config(parallel=PARALLEL, placement={"start": start})
    stepper = OnPaper(config, SimpleNamespace())
    policies = make_policies(config, stepper, no_trace)
    assert len(policies) == 1 + (start is not None)
    assert stepper.expert_of_slot_LP.tolist() == (start or [[0, 1, 2, 3]])
    for policy in policies:  # without a policy they stay
        assert list(policy(1000, SimpleNamespace(cosine_LT=[]))) == []


STATES = {
    "capacities": ([7], small_config()),
    "slot_factors": ([1.953125, 0.5], static(local_factor="auto", remote_factor=0.5)),
    "slot_to_expert": (
        [[1, 0, 3, 2]],
        small_config(parallel=PARALLEL, placement={"policy": "eplb"}),
    ),
}


@pytest.mark.parametrize("key", STATES)
def test_the_state_of_a_checkpoint_is_what_it_was(key):
    """The key and its value, there and back; a checkpoint of a run without the policy changes
    nothing.
    """
    value, config = STATES[key]
    stepper = OnPaper(config, SimpleNamespace())
    policies = make_policies(config, stepper, no_trace)
    (policy,) = (one for one in policies if key in one.state())
    assert set(policy.state()) == {key} and policy.state()[key] != value
    before = policy.state()
    if key != "capacities":  # which every checkpoint has
        policy.restore({"step": 3})
        assert policy.state() == before
    policy.restore({"step": 3, key: value, "another": 1})
    assert policy.state() == {key: value}
    if key == "slot_to_expert":
        policy.restore({"expert_of_slot": before[key]})
        assert policy.state() == before
