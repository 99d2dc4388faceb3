"""Tokens to slots and back: for any plan the way there and back is the identity, and what is
dropped is what should be.
"""

from __future__ import annotations

from typing import Optional

import mindspore as ms
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mindspore import nn, ops
from support.numeric import Probe, close, integers, slope, tensor

from pangu_locmoe.moe import dispatch

RANDOM = np.random.default_rng(7)


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def mode(request):
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=before)


def one_hot(expert_A: np.ndarray, num_experts: int) -> np.ndarray:
    return np.eye(num_experts)[expert_A]


def ranks(expert_A: np.ndarray, affinity_A: Optional[np.ndarray]) -> np.ndarray:
    """How many tokens of the same expert come first: by affinity, then by position."""
    keys = np.zeros(len(expert_A)) if affinity_A is None else -affinity_A
    position_A = np.zeros(len(expert_A), int)
    served = {}
    for token in sorted(range(len(expert_A)), key=lambda t: (keys[t], t)):
        position_A[token] = served.get(expert_A[token], 0)
        served[expert_A[token]] = position_A[token] + 1
    return position_A


@st.composite
def plans(draw):
    """Experts of up to 40 tokens, affinities with ties, a capacity (None: dropless)."""
    num_experts = draw(st.integers(1, 6))
    expert_A = np.array(draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=40)))
    affinity_A = draw(
        st.one_of(
            st.none(), st.lists(st.integers(0, 4), min_size=len(expert_A), max_size=len(expert_A))
        )
    )
    capacity = draw(st.one_of(st.none(), st.integers(1, 12)))
    return expert_A, num_experts, None if affinity_A is None else np.array(affinity_A) / 4, capacity


def test_an_ascend_device_sorts_stably(monkeypatch):
    """The operator it has for that is asked; with a stand-in for it, positions are the same."""
    asked = []

    def sort(values, stable):
        asked.append(stable)
        return ops.sort(values)

    affinity_A = tensor([0.5, 0.25, 0.5, 1.0, 0.25, 0.5])
    hot_AE = tensor(one_hot(np.array([0, 0, 0, 1, 1, 0]), 2))
    wanted = dispatch.position_within_expert(hot_AE, affinity_A)
    monkeypatch.setattr(dispatch, "on_ascend", lambda: True)
    monkeypatch.setattr(dispatch.mint, "sort", sort)
    found = dispatch.position_within_expert(hot_AE, affinity_A)
    assert asked == [True]
    assert found.asnumpy().tolist() == wanted.asnumpy().tolist() == [0, 3, 1, 0, 1, 2]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(plans())
@example((np.zeros(13, int), 4, None, None))  # all tokens to one expert, 13 not divisible by 4
@example((np.full(13, 3), 4, None, None))  # all to the last
@example((np.array([5]), 6, None, None))  # fewer tokens than experts
@example((np.array([0, 1, 1, 1, 1]), 2, np.array([0.5, 0.5, 1.0, 0.5, 0.0]), 2))
def test_dispatch_then_combine_is_the_identity_for_any_plan(plan):
    expert_A, num_experts, affinity_A, capacity = plan
    tokens = len(expert_A)
    position_A = dispatch.position_within_expert(
        tensor(one_hot(expert_A, num_experts)), None if affinity_A is None else tensor(affinity_A)
    )
    wanted_T = ranks(expert_A, affinity_A)
    np.testing.assert_array_equal(position_A.asnumpy(), wanted_T)
    load_E = np.bincount(expert_A, minlength=num_experts)
    if capacity is None:
        slot_of_row_A, expert_of_group_G = dispatch.block_slots(
            integers(expert_A), position_A, tensor(load_E)
        )
        size = dispatch.block_size(tokens, num_experts)
        owner_G = expert_of_group_G.asnumpy()
        assert len(owner_G) == dispatch.num_blocks(tokens, num_experts)
        assert (
            len(owner_G) * size <= 2 * tokens + 2 * num_experts
        )  # "no plan needs more than about twice the tokens"
        assert len(owner_G) <= tokens  # one token alone: one expert's matrices
        kept_T = np.ones(tokens, bool)
    else:
        slot_of_row_A = dispatch.capacity_slots(integers(expert_A), position_A, capacity)
        size = capacity
        owner_G = np.arange(num_experts)
        kept_T = wanted_T < capacity
    slots = slot_of_row_A.asnumpy()
    num_slots = len(owner_G) * size

    # every kept token has a slot of its own, in a group of its expert; the others have none
    np.testing.assert_array_equal(slots > 0, kept_T)
    assert len(set(slots[kept_T])) == kept_T.sum()
    assert slots.max(initial=0) <= num_slots
    np.testing.assert_array_equal(owner_G[(slots[kept_T] - 1) // size], expert_A[kept_T])
    if affinity_A is not None and capacity is not None:
        for expert in range(num_experts):
            mine = (expert_A == expert) & kept_T
            lost = (expert_A == expert) & ~kept_T
            assert mine.sum() == min(load_E[expert], capacity)
            assert not lost.any() or affinity_A[lost].max() <= affinity_A[mine].min()

    # the inverse map, and the way there and back
    row_of_slot_Q = dispatch.row_of_slot(slot_of_row_A, num_slots)
    inverse = np.zeros(num_slots, int)
    inverse[slots[kept_T] - 1] = np.flatnonzero(kept_T) + 1
    np.testing.assert_array_equal(row_of_slot_Q.asnumpy(), inverse)
    x_TD = np.float32(RANDOM.standard_normal((tokens, 3)))
    weight_A = np.float32(RANDOM.uniform(0.1, 1, tokens))
    slots_QD = dispatch.Dispatch()(tensor(x_TD), row_of_slot_Q, slot_of_row_A)
    assert not slots_QD.asnumpy()[inverse == 0].any()
    y_TD = dispatch.Combine()(slots_QD, tensor(weight_A), row_of_slot_Q, slot_of_row_A).asnumpy()
    np.testing.assert_array_equal(y_TD, np.where(kept_T[:, None], weight_A[:, None] * x_TD, 0))


def test_ties_in_affinity_go_by_position():
    expert_A = np.zeros(6, int)
    affinity_A = np.array([0.5, 0.7, 0.5, 0.7, 0.1, 0.5])
    position_A = dispatch.position_within_expert(tensor(one_hot(expert_A, 2)), tensor(affinity_A))
    np.testing.assert_array_equal(position_A.asnumpy(), [2, 0, 3, 1, 5, 4])


class Ranks(nn.Cell):
    def construct(self, one_hot_AE, affinity_A):
        return dispatch.position_within_expert(
            one_hot_AE, affinity_A
        ), dispatch.position_within_expert(one_hot_AE, None)


@pytest.mark.parametrize(("tokens", "ties"), [(7, True), (4096, True), (4096, False)])
def test_ranks_of_many_tokens(mode, tokens, ties):
    expert_A = RANDOM.integers(0, 4, tokens)  # the last of five experts stays empty
    affinity_A = RANDOM.integers(0, 3, tokens) / 2 if ties else RANDOM.permutation(tokens) / tokens
    by_affinity, by_position = Ranks()(tensor(one_hot(expert_A, 5)), tensor(affinity_A))
    np.testing.assert_array_equal(by_affinity.asnumpy(), ranks(expert_A, affinity_A))
    np.testing.assert_array_equal(by_position.asnumpy(), ranks(expert_A, None))
    assert by_affinity.dtype == by_position.dtype == ms.int32


class Blocks(nn.Cell):
    def construct(self, expert_A, position_A, load_E):
        slot_of_row_A, expert_of_group_G = dispatch.block_slots(expert_A, position_A, load_E)
        groups = dispatch.num_blocks(expert_A.shape[0], load_E.shape[0]) * dispatch.block_size(
            expert_A.shape[0], load_E.shape[0]
        )
        return slot_of_row_A, expert_of_group_G, dispatch.row_of_slot(slot_of_row_A, groups)


def test_blocks_by_hand(mode):
    """7 tokens, 3 experts: blocks of 3 slots, 5 of them; loads 1, 4, 2 need 1, 2 and 1 blocks,
    one is spare.
    """
    expert_A = np.array([1, 0, 1, 2, 1, 1, 2])
    slots, owner, row_of_slot = Blocks()(
        integers(expert_A), integers([0, 0, 1, 0, 2, 3, 1]), tensor([1, 4, 2])
    )
    np.testing.assert_array_equal(slots.asnumpy(), [4, 1, 5, 10, 6, 7, 11])
    np.testing.assert_array_equal(owner.asnumpy(), [0, 1, 1, 2, 2])
    np.testing.assert_array_equal(
        row_of_slot.asnumpy(), [2, 0, 0, 1, 3, 5, 6, 0, 0, 4, 7, 0, 0, 0, 0]
    )


# five tokens, two experts of two slots; tokens 3 and 4 are dropped, slot 3 (expert 1, second place)
# is empty
TOKEN_OF_SLOT = np.array([3, 1, 2, 0])
SLOT_OF_TOKEN = np.array([2, 3, 1, 0, 0])


def test_dispatch_and_its_gradient(mode):
    x = RANDOM.standard_normal((5, 4))
    sens = RANDOM.standard_normal((4, 4))
    maps = integers(TOKEN_OF_SLOT), integers(SLOT_OF_TOKEN)
    close(
        dispatch.Dispatch()(tensor(x), *maps), np.concatenate([np.zeros((1, 4)), x])[TOKEN_OF_SLOT]
    )
    dx = Probe(dispatch.Dispatch())(tensor(x), *maps, tensor(sens))[0]
    close(dx, slope(lambda v: np.concatenate([np.zeros((1, 4)), v])[TOKEN_OF_SLOT], x, sens))


def test_combine_and_its_gradients(mode):
    slots = RANDOM.standard_normal((4, 6))
    weight = RANDOM.standard_normal(5)
    sens = RANDOM.standard_normal((5, 6))
    maps = integers(TOKEN_OF_SLOT), integers(SLOT_OF_TOKEN)

    def combine(slots, weight):
        return weight[:, None] * np.concatenate([np.zeros((1, 6)), slots])[SLOT_OF_TOKEN]

    close(dispatch.Combine()(tensor(slots), tensor(weight), *maps), combine(slots, weight))
    dslots, dweight = Probe(dispatch.Combine())(tensor(slots), tensor(weight), *maps, tensor(sens))[
        :2
    ]
    close(dslots, slope(lambda v: combine(v, weight), slots, sens))
    close(dweight, slope(lambda v: combine(slots, v), weight, sens))


def test_half_precision_stays_half_precision():
    x = ops.cast(tensor(RANDOM.standard_normal((5, 4))), ms.float16)
    slots = dispatch.Dispatch()(x, integers(TOKEN_OF_SLOT), integers(SLOT_OF_TOKEN))
    y = dispatch.Combine()(
        slots, ops.ones(5, ms.float16), integers(TOKEN_OF_SLOT), integers(SLOT_OF_TOKEN)
    )
    assert slots.dtype == y.dtype == ms.float16
    np.testing.assert_array_equal(y.asnumpy()[:3], x.asnumpy()[:3])
