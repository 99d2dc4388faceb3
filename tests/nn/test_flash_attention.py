"""Flash attention: what the operator is handed, and that its documented formula is the portable
layer's.

The operator exists on Ascend only. A stand-in made of other operators follows its documentation:
softmax(mask(scale * (query key^T)), keep_prob 1) value, with 1 in the mask for what is discarded.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from support.numeric import Probe, close, integers, no_noise, softmax, tensor
from support.small import small_config

from pangu_locmoe.errors import ConfigError
from pangu_locmoe.model.attention import attention_mask
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.nn import flash_attention as fused
from pangu_locmoe.nn import functional
from pangu_locmoe.train.run import train

RANDOM = np.random.default_rng(23)
BATCH = 2
HEADS = 2
LENGTH = 8
FEATURES = 16
SEGMENTS_BS = np.array([[0, 0, 0, 1, 1, 1, 1, 2], [0] * 8])
CAUSAL_SS = np.tril(np.ones((LENGTH, LENGTH)))


class Recorder:
    """The stand-in. Keeps the arguments of its calls."""

    def __init__(self) -> None:
        self.calls: list = []

    def __call__(self, query, key, value, head_num, **settings):
        self.calls.append((query, key, value, head_num, settings))
        assert settings["input_layout"] == "BNSD"
        scores = (
            ops.BatchMatMul(transpose_b=True)(query, key).astype(ms.float32)
            * settings["scalar_value"]
        )
        discarded = settings["attn_mask"].astype(ms.float32)
        weights = ops.Softmax(-1)(scores - discarded * 1e9)
        return ops.BatchMatMul()(weights.astype(value.dtype), value)


@pytest.fixture
def operator(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(fused.ops, "flash_attention_score", recorder)
    monkeypatch.setattr(fused, "on_ascend", lambda: True)
    return recorder


def documented(query, key, value, scale, mask):
    """The documentation's formula in NumPy, float64."""
    return softmax(np.where(mask == 1, -np.inf, scale * (query @ key.swapaxes(2, 3)))) @ value


def test_the_documented_formula_is_the_portable_layer(operator):
    q, k, v, sens = RANDOM.standard_normal((4, BATCH, HEADS, LENGTH, FEATURES))
    mask = fused.discard_mask(integers(SEGMENTS_BS), tensor(CAUSAL_SS))
    additive = attention_mask(integers(SEGMENTS_BS), tensor(CAUSAL_SS), HEADS)
    arguments = [tensor(array) for array in (q, k, v)]
    got = fused.FlashAttention()(*arguments, mask)
    (call,) = operator.calls
    wanted = documented(
        *(array.asnumpy().astype(float) for array in call[:3]),
        call[4]["scalar_value"],
        call[4]["attn_mask"].asnumpy(),
    )
    close(functional.Attention()(*arguments, additive), wanted)
    close(got, wanted)
    portable = Probe(functional.Attention())(*arguments, additive, tensor(sens))
    for mine, theirs in zip(
        Probe(fused.FlashAttention())(*arguments, mask, tensor(sens))[:3], portable[:3]
    ):
        close(mine, theirs.asnumpy())


def test_the_mask_says_what_is_discarded():
    mask = fused.discard_mask(integers(SEGMENTS_BS), tensor(CAUSAL_SS))
    assert (mask.shape, mask.dtype) == ((BATCH, 1, LENGTH, LENGTH), ms.uint8)
    visible = (SEGMENTS_BS[:, :, None] == SEGMENTS_BS[:, None, :]) & (CAUSAL_SS == 1)
    np.testing.assert_array_equal(mask.asnumpy()[:, 0], 1 - visible)


def config_of(fused_operators: bool):
    return small_config(
        model={"hidden_size": 32},
        moe={"router": "hash"},
        train={"precision": "fp16", "fused": fused_operators},
    )


def logits(model: PanguSigma) -> np.ndarray:
    tokens = integers(np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH))
    positions = integers(np.tile(np.arange(LENGTH), (BATCH, 1)))
    return model(
        tokens,
        positions,
        integers(SEGMENTS_BS),
        integers([0, 1]),
        no_noise(BATCH * LENGTH, 32),
        (DROPLESS,),
        False,
    )[0].asnumpy()


def test_a_model_hands_all_its_layers_to_the_operator(operator):
    got = logits(PanguSigma(config_of(True)))
    assert len(operator.calls) == 3
    for query, key, value, heads, settings in operator.calls:
        assert (
            query.shape == key.shape == value.shape == (BATCH, HEADS, LENGTH, FEATURES)
            and heads == HEADS
        )
        assert query.dtype == key.dtype == value.dtype == ms.float16
        # Queries come scaled: no more of it here, and what is not named is the operator's default,
        # without dropout.
        assert settings["scalar_value"] == 1.0 and settings["sparse_mode"] == 0
        assert (
            settings["attn_mask"].shape == (BATCH, 1, LENGTH, LENGTH)
            and settings["attn_mask"].dtype == ms.uint8
        )
        assert settings.keys() == {"attn_mask", "scalar_value", "input_layout", "sparse_mode"}
    wanted = logits(PanguSigma(config_of(False)))
    assert len(operator.calls) == 3
    close(got, wanted, 2**-7)  # the same roundings to fp16, in another order


def test_elsewhere_a_model_is_portable(monkeypatch):
    """So a checkpoint trained with fused operators is evaluated on a CPU."""

    def nothing(*arguments, **settings) -> Tensor:
        raise AssertionError("the operator was called")

    monkeypatch.setattr(fused.ops, "flash_attention_score", nothing)
    np.testing.assert_array_equal(
        logits(PanguSigma(config_of(True))), logits(PanguSigma(config_of(False)))
    )


def test_training_with_them_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"train.fused = True: the fused operators are Ascend's, and this is a CPU; must be false",
    ):
        train(config_of(True), tmp_path / "run", progress=False)
