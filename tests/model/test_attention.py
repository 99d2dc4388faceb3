"""Attention with its projections, its mask, and PanGu-alpha's query layer, against NumPy."""

from __future__ import annotations

import numpy as np
from support.numeric import close, gelu, integers, layer_norm, no_noise, softmax, tensor
from support.small import small_config

from pangu_locmoe.model.attention import Attention, attention_mask
from pangu_locmoe.model.block import QueryLayer
from pangu_locmoe.parallel.tensor import TensorGroup

RANDOM = np.random.default_rng(19)
BATCH = 2
LENGTH = 8
HIDDEN = 16
SEGMENTS_BS = np.array([[0, 0, 0, 1, 1, 1, 1, 2], [0] * 8])
POSITIONS_BS = np.array([[0, 1, 2, 0, 1, 2, 3, 0], range(8)])
CAUSAL_SS = np.tril(np.ones((LENGTH, LENGTH)))


def visible() -> np.ndarray:
    return (SEGMENTS_BS[:, :, None] == SEGMENTS_BS[:, None, :]) & (CAUSAL_SS == 1)


def mask():
    return attention_mask(integers(SEGMENTS_BS), tensor(CAUSAL_SS), 2)


def attend(cell: Attention, query_BSD: np.ndarray, x_BSD: np.ndarray) -> np.ndarray:
    """Two heads of eight features, one after the other."""
    w_query, w_key_value, w_out = (
        w.asnumpy().astype(float) for w in (cell.w_query, cell.w_key_value, cell.w_out)
    )
    mixed = np.zeros_like(x_BSD)
    for head in (slice(0, 8), slice(8, 16)):
        q = query_BSD @ w_query[:, head]
        k = x_BSD @ w_key_value[:, head]
        v = x_BSD @ w_key_value[:, HIDDEN:][:, head]
        scores = np.where(visible(), q @ k.swapaxes(1, 2) / 8**0.5, -np.inf)
        mixed[:, :, head] = softmax(scores) @ v
    return mixed @ w_out


def test_a_token_sees_its_own_segment_up_to_itself():
    mask_BHSS = mask().asnumpy()
    assert mask_BHSS.shape == (BATCH, 2, LENGTH, LENGTH)
    for head in range(2):
        np.testing.assert_array_equal(mask_BHSS[:, head] == 0, visible())
    assert (mask_BHSS[mask_BHSS != 0] <= -1e9).all()
    np.testing.assert_array_equal(
        visible()[0, 5], [False, False, False, True, True, True, False, False]
    )


def test_attention():
    cell = Attention(small_config().model, [1], TensorGroup.alone())
    query_BSD = RANDOM.standard_normal((BATCH, LENGTH, HIDDEN))
    x_BSD = RANDOM.standard_normal((BATCH, LENGTH, HIDDEN))
    rows = (BATCH * LENGTH, HIDDEN)
    close(
        cell(tensor(query_BSD.reshape(rows)), tensor(x_BSD.reshape(rows)), mask()),
        attend(cell, query_BSD, x_BSD).reshape(rows),
    )


def test_query_layer():
    """Q = table[position], K = V = LN1(H); x = H + attention; x + FFN(LN2(x))."""
    config = small_config()
    layer = QueryLayer(config, 2, TensorGroup.alone())
    for norm in (layer.norm1, layer.norm2):
        norm.gamma.set_data(tensor(RANDOM.uniform(0.5, 1.5, HIDDEN)))
        norm.beta.set_data(tensor(RANDOM.standard_normal(HIDDEN)))
    x_BSD = RANDOM.standard_normal((BATCH, LENGTH, HIDDEN))
    norm1, norm2 = (
        (norm.gamma.asnumpy().astype(float), norm.beta.asnumpy().astype(float))
        for norm in (layer.norm1, layer.norm2)
    )
    query_BSD = layer.query_table.asnumpy().astype(float)[POSITIONS_BS]
    attended = x_BSD + attend(layer.attention, query_BSD, layer_norm(x_BSD, *norm1))
    wanted = (
        attended
        + gelu(layer_norm(attended, *norm2) @ layer.ffn.w_in.asnumpy()) @ layer.ffn.w_out.asnumpy()
    )
    noise = no_noise(BATCH * LENGTH, HIDDEN)
    rows = (BATCH * LENGTH, HIDDEN)
    close(
        layer(
            tensor(x_BSD.reshape(rows)), mask(), integers(POSITIONS_BS.reshape(-1)), noise, False
        ),
        wanted.reshape(rows),
    )
