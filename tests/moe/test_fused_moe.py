"""Permutation and grouped products by Ascend's operators: what they are handed, and that their
documentation is the portable layer.

The operators exist on Ascend only; the stand-ins follow their documentation, and refuse what it
excludes.
"""

from __future__ import annotations

from typing import ClassVar, List

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from support.numeric import Probe, close, integers, no_noise, tensor
from support.small import small_config

from pangu_locmoe.moe import fused
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.moe.dispatch import Combine, Dispatch
from pangu_locmoe.moe.domains import allowed_experts
from pangu_locmoe.moe.fused import PermuteTokens, UnpermuteTokens, grouped_rows
from pangu_locmoe.moe.layer import MoELayer
from pangu_locmoe.moe.routers.base import RouterContext
from pangu_locmoe.moe.transport.counts import assign_slots
from pangu_locmoe.nn import flash_attention as on_device
from pangu_locmoe.parallel.communicator import SingleProcess
from pangu_locmoe.parallel.exchange import Exchange
from pangu_locmoe.parallel.topology import Topology

RANDOM = np.random.default_rng(29)
TOKENS = 24
HIDDEN = 16
EXPERTS = 4


def permute(tokens: Tensor, indices: Tensor):
    """Tokens of the same index together, in order; and where each token went."""
    position = np.argsort(np.argsort(indices.asnumpy(), kind="stable"), kind="stable").astype(
        np.int32
    )
    return ops.gather(tokens, integers(np.argsort(position)), 0), Tensor(position)


def unpermute(rows: Tensor, sorted_indices: Tensor, probs: Tensor):
    assert sorted_indices.dtype == ms.int32 and probs.shape == (*sorted_indices.shape, 1)
    return ops.gather(rows, sorted_indices, 0) * probs


class Grouped:
    """GroupedMatmul(split_item=3, group_type=0): one tensor of rows, cut where group_list says,
    times an expert's matrix each.
    """

    ends: ClassVar[List[np.ndarray]] = []

    def __init__(self, split_item: int, group_type: int) -> None:
        assert (split_item, group_type) == (3, 0)

    def __call__(
        self, x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, group_list
    ):
        assert (
            bias is scale is offset is antiquant_scale is antiquant_offset is None
        )  # else it has no gradient
        (rows,), (matrices,) = x, weight
        assert group_list.dtype == ms.int64 and group_list.shape == matrices.shape[:1]
        ends = group_list.asnumpy()
        assert ends[-1] == rows.shape[0] and (np.diff(ends, prepend=0) > 0).all(), (
            "an expert without rows"
        )
        self.ends.append(ends)
        starts = [0, *ends[:-1].tolist()]
        return (
            ops.concat(
                [
                    ops.MatMul()(rows[start:end], matrices[g])
                    for g, (start, end) in enumerate(zip(starts, ends.tolist()))
                ],
                0,
            ),
        )


@pytest.fixture
def operators(monkeypatch):
    monkeypatch.setattr(fused.ops, "moe_token_permute", permute)
    monkeypatch.setattr(fused.ops, "moe_token_unpermute", unpermute)
    monkeypatch.setattr(fused, "GroupedMatmul", Grouped)
    monkeypatch.setattr(on_device, "on_ascend", lambda: True)
    monkeypatch.setattr(Grouped, "ends", [])


def test_the_stand_in_gives_the_documentations_example():
    rows, positions = permute(tensor([[1], [7], [2], [1], [2], [3]]), integers([5, 0, 3, 1, 2, 4]))
    assert rows.asnumpy()[:, 0].tolist() == [7, 1, 2, 2, 3, 1] and positions.asnumpy().tolist() == [
        5,
        0,
        3,
        1,
        2,
        4,
    ]


def test_permutation_is_dispatch_and_combine(operators):
    order = RANDOM.permutation(TOKENS)
    row_of_position = integers(order + 1)
    position_of_row = integers(np.argsort(order) + 1)
    x = tensor(RANDOM.standard_normal((TOKENS, HIDDEN)))
    weight = tensor(RANDOM.random(TOKENS))
    sens = tensor(RANDOM.standard_normal((TOKENS, HIDDEN)))
    maps = (row_of_position, position_of_row)
    close(PermuteTokens()(x, *maps), Dispatch()(x, *maps).asnumpy())
    close(UnpermuteTokens()(x, weight, *maps), Combine()(x, weight, *maps).asnumpy())
    for mine, theirs in zip(
        Probe(UnpermuteTokens())(x, weight, *maps, sens)[:2],
        Probe(Combine())(x, weight, *maps, sens)[:2],
    ):
        close(mine, theirs.asnumpy())


@pytest.mark.parametrize("capacity", [DROPLESS, 2], ids=["dropless", "two each"])
def test_rows_by_expert(capacity):
    """Two sources, four experts: the second has no rows, the third more than its capacity."""
    counts_RG = np.array([[1, 0, 3, 0], [2, 0, 1, 1]])
    slot_of_row, slots, dropped = assign_slots(counts_RG, None, capacity)
    row_of_position, position_of_row, ends = grouped_rows(slot_of_row, slots, 4)
    if capacity == DROPLESS:
        assert row_of_position.tolist() == [1, 5, 6, 0, 2, 3, 4, 7, 8]
        assert ends.tolist() == [3, 4, 8, 9]
    else:
        assert dropped.tolist() == [1, 0, 2, 0]
        assert row_of_position.tolist() == [1, 5, 0, 2, 3, 8]
        assert ends.tolist() == [2, 3, 5, 6]
    assert ends.dtype == np.int64
    for row, position in enumerate(position_of_row, 1):
        assert position == 0 if row not in row_of_position else row_of_position[position - 1] == row


def layer_of(config):
    """A world of one."""
    allowed_JE = allowed_experts(config)
    context = RouterContext(
        0, allowed_JE, Topology(1, 1, 1, EXPERTS), np.ones((len(allowed_JE), 300), np.int64)
    )
    return MoELayer.of(config, context, Exchange(SingleProcess(), [0], [0], False))


@pytest.mark.parametrize("capacity", [DROPLESS, 4], ids=["dropless", "drops"])
def test_the_layer_is_the_portable_one(operators, monkeypatch, capacity):
    x, sens = RANDOM.standard_normal((2, TOKENS, HIDDEN))
    x[:, 12:] -= 2.0  # the last expert's features: it gets no token
    tokens = integers(RANDOM.integers(0, 300, TOKENS))
    domains = integers(np.zeros(TOKENS))
    results = []
    for fused_operators in (True, False):
        config = small_config(
            model={"num_heads": 1},
            moe={"router": "locmoe"},
            parallel={"expert_parallel": 2},
            train={"fused": fused_operators, "precision": "fp16"},
        )
        layer = layer_of(config)

        def objective(x_TD, layer=layer):
            y_TD, stats = layer(x_TD, tokens, domains, no_noise(TOKENS, HIDDEN), capacity, True)
            return ops.reduce_sum(y_TD * tensor(sens)), y_TD, stats["dropped_E"], stats["load_NE"]

        weights = ms.ParameterTuple(layer.trainable_params())
        (_, y_TD, dropped_E, load_NE), (dx_TD, dweights) = ms.value_and_grad(
            objective, 0, weights, has_aux=True
        )(tensor(x))
        results.append([y_TD, dropped_E, load_NE, dx_TD, *dweights])
    assert len(Grouped.ends) == 2  # the two products of the first layer; the second has none
    assert results[0][2].asnumpy()[0, 3] == 0 and (results[0][1].asnumpy().sum() > 0) == (
        capacity != DROPLESS
    )
    for mine, theirs in zip(*results):
        close(mine, theirs.asnumpy())
