"""The whole model: against NumPy, sparse against dense, what a token can see, compiled against
uncompiled.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.numeric import close, gelu, integers, layer_norm, softmax
from support.small import small_config

from pangu_locmoe.data.loader import Batch
from pangu_locmoe.data.packing import positions_and_segments
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.nn.noise import draw_keys
from pangu_locmoe.train.step import LocalStepper, Objective

BATCH = 4
LENGTH = 8
VOCAB = 300
HIDDEN = 16
EOD = 299
RANDOM = np.random.default_rng(23)


def make_batch() -> Batch:
    """Four sequences of two domains; the first has three documents."""
    sequences = RANDOM.integers(0, EOD, (BATCH, LENGTH + 1)).astype(np.int32)
    sequences[0, [3, 6]] = EOD
    tokens_BS = sequences[:, :-1].copy()
    targets_BS = sequences[:, 1:].copy()
    positions_BS, segments_BS = positions_and_segments(tokens_BS, EOD, True)
    return Batch(
        tokens_BS,
        targets_BS,
        positions_BS,
        segments_BS,
        np.array([0, 0, 1, 1], np.int32),
        np.ones(BATCH, bool),
    )


BATCH_OF_FOUR = make_batch()


def inputs(batch: Batch) -> list[Tensor]:
    return [
        Tensor(array)
        for array in (batch.tokens_BS, batch.positions_BS, batch.segments_BS, batch.domains_B)
    ]


def keys(step: int = 1) -> tuple[Tensor, Tensor]:
    rows, columns = draw_keys(1, step, BATCH * LENGTH, HIDDEN)
    return Tensor(rows), Tensor(columns)


def logits(
    model: PanguSigma,
    batch: Batch = BATCH_OF_FOUR,
    training: bool = False,
    step: int = 1,
    capacity: int = DROPLESS,
) -> np.ndarray:
    layers = sum(block.sparse for block in model.blocks)
    return model(*inputs(batch), keys(step), (capacity,) * layers, training)[0].asnumpy()


def gradients(model: PanguSigma, config, capacity: int = DROPLESS, jit: bool = False):
    """Loss and the gradient by each parameter's name."""
    parameters = ms.ParameterTuple(model.trainable_params())
    objective = Objective(model, config, (capacity,) * config.model.num_moe_layers)
    function = ms.value_and_grad(objective, None, parameters, has_aux=True)
    function = ms.jit(function) if jit else function
    batch = BATCH_OF_FOUR
    arrays = [
        Tensor(a)
        for a in (
            batch.tokens_BS,
            batch.targets_BS,
            batch.positions_BS,
            batch.segments_BS,
            batch.domains_B,
        )
    ]
    (loss, _, _), found = function(*arrays, *keys(), Tensor(1.0, ms.float32))
    return float(loss), {
        parameter.name: gradient.asnumpy() for parameter, gradient in zip(parameters, found)
    }


# against NumPy


def reference(model: PanguSigma, batch: Batch, per_domain: bool) -> np.ndarray:
    """PanGu-alpha's trunk with LocMoE's layer, in float64: logits [T, V]."""
    w = {
        parameter.name: parameter.asnumpy().astype(np.float64)
        for parameter in model.get_parameters()
    }
    visible = (batch.segments_BS[:, :, None] == batch.segments_BS[:, None, :]) & np.tri(
        LENGTH, dtype=bool
    )

    def norm(name, x):
        return layer_norm(x, w[f"{name}.gamma"], w[f"{name}.beta"])

    def attend(name, query, x):
        mixed = np.zeros_like(x)
        for head in (slice(0, 8), slice(8, 16)):
            q = query @ w[f"{name}.w_query"][:, head]
            k = x @ w[f"{name}.w_key_value"][:, head]
            v = x @ w[f"{name}.w_key_value"][:, HIDDEN:][:, head]
            mixed[:, :, head] = (
                softmax(np.where(visible, q @ k.swapaxes(1, 2) / 8**0.5, -np.inf)) @ v
            )
        return mixed @ w[f"{name}.w_out"]

    def feed(name, x):
        return gelu(x @ w[f"{name}.w_in"]) @ w[f"{name}.w_out"]

    def experts(name, x):
        y = np.zeros_like(x)
        for b, s in np.ndindex(BATCH, LENGTH):
            p = softmax(2 * x[b, s].reshape(4, -1).mean(-1))
            y[b, s] = p.max() * (
                gelu(x[b, s] @ w[f"{name}.w_in"][p.argmax()]) @ w[f"{name}.w_out"][p.argmax()]
            )
        return y

    table = w["word_table"].reshape(-1, VOCAB, HIDDEN)
    table_BVD = table[batch.domains_B if per_domain else np.zeros(BATCH, int)]
    x = (
        np.stack([table_BVD[b, batch.tokens_BS[b]] for b in range(BATCH)])
        + w["position_table"][batch.positions_BS]
    )
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        normed = norm(f"{name}.norm1", x)
        x = x + attend(f"{name}.attention", normed, normed)
        normed = norm(f"{name}.norm2", x)
        x = x + (
            experts(f"{name}.moe.experts", normed) if block.sparse else feed(f"{name}.ffn", normed)
        )
    x = norm("final_norm", x) if model.has_final_norm else x
    x = x + attend(
        "query_layer.attention",
        w["query_layer.query_table"][batch.positions_BS],
        norm("query_layer.norm1", x),
    )
    x = x + feed("query_layer.ffn", norm("query_layer.norm2", x))
    return (x @ table_BVD.swapaxes(1, 2)).reshape(-1, VOCAB)


@pytest.mark.parametrize("per_domain", [False, True], ids=["one embedding", "embedding per domain"])
@pytest.mark.parametrize("sparse", [0, 1], ids=["dense", "sparse"])
@pytest.mark.parametrize("final_norm", [True, False], ids=["final norm", "none"])
def test_the_model_against_numpy(per_domain, sparse, final_norm):
    model = PanguSigma(
        small_config(
            model={
                "num_moe_layers": sparse,
                "domain_embeddings": per_domain,
                "final_norm": final_norm,
            }
        )
    )
    assert final_norm == any(
        parameter.name.startswith("final_norm.") for parameter in model.trainable_params()
    )
    if final_norm:
        model.final_norm.gamma.set_data(Tensor(np.linspace(0.5, 1.5, HIDDEN, dtype=np.float32)))
        model.final_norm.beta.set_data(Tensor(np.linspace(-1, 1, HIDDEN, dtype=np.float32)))
    close(logits(model), reference(model, BATCH_OF_FOUR, per_domain), 2e-5)


# sparse and dense


def test_a_hash_model_of_one_expert_equals_the_dense_model():
    config = small_config(moe={"router": "hash", "num_experts": 1})
    dense_config = small_config(model={"num_moe_layers": 0})
    sparse = PanguSigma(config)
    dense = PanguSigma(dense_config)
    values = {parameter.name: parameter.asnumpy() for parameter in dense.get_parameters()}
    names = {
        parameter.name: parameter.name.replace(".moe.experts.", ".ffn.")
        for parameter in sparse.trainable_params()
    }
    for parameter in sparse.trainable_params():
        parameter.set_data(Tensor(values[names[parameter.name]].reshape(parameter.shape)))
    close(logits(sparse), logits(dense), 1e-6)
    loss, found = gradients(sparse, config)
    dense_loss, wanted = gradients(dense, dense_config)
    assert loss == pytest.approx(dense_loss, rel=1e-6)
    assert {names[name] for name in found} == set(wanted)
    for name, gradient in found.items():
        close(gradient.reshape(wanted[names[name]].shape), wanted[names[name]], 5e-6)


def test_the_trunks_initial_weights_do_not_depend_on_the_router():
    trunks = []
    for router in ("hash", "switch", "locmoe", "locmoe_plus"):
        model = PanguSigma(small_config(moe={"router": router}))
        trunks.append(
            {p.name: p.asnumpy() for p in model.get_parameters() if ".router." not in p.name}
        )
    for name, value in trunks[0].items():
        np.testing.assert_array_equal(trunks[1][name], value)
        np.testing.assert_array_equal(trunks[2][name], value)


# what a token can see


@pytest.mark.parametrize("router", ["hash", "switch", "locmoe", "locmoe_plus"])
def test_a_token_sees_only_earlier_tokens_of_its_own_document(router):
    model = PanguSigma(small_config(moe={"router": router}))
    before = logits(model).reshape(BATCH, LENGTH, VOCAB)
    segments_S = BATCH_OF_FOUR.segments_BS[0]
    np.testing.assert_array_equal(segments_S, [0, 0, 0, 1, 1, 1, 2, 2])
    for changed in (1, 4, 7):
        tokens_BS = BATCH_OF_FOUR.tokens_BS.copy()
        tokens_BS[0, changed] = (tokens_BS[0, changed] + 1) % EOD
        batch = Batch(
            tokens_BS,
            *[
                getattr(BATCH_OF_FOUR, name)
                for name in ("targets_BS", "positions_BS", "segments_BS", "domains_B", "valid_B")
            ],
        )
        after = logits(model, batch).reshape(BATCH, LENGTH, VOCAB)
        reached_S = (segments_S == segments_S[changed]) & (np.arange(LENGTH) >= changed)
        assert (np.abs(after - before)[0, reached_S].max(1) > 1e-3).all()
        close(after[0, ~reached_S], before[0, ~reached_S], 2e-6)
        close(after[1:], before[1:], 2e-6)


def test_a_document_has_the_same_logits_wherever_it_begins():
    """Positions and attention are reset, so the second document alone, at the start of a
    sequence, is the same.
    """
    model = PanguSigma(small_config())
    np.testing.assert_array_equal(BATCH_OF_FOUR.positions_BS[0], [0, 1, 2, 0, 1, 2, 0, 1])
    tokens_BS = BATCH_OF_FOUR.tokens_BS.copy()
    tokens_BS[1, :3] = tokens_BS[0, 3:6]
    positions_BS, segments_BS = positions_and_segments(tokens_BS, EOD, True)
    batch = Batch(
        tokens_BS,
        BATCH_OF_FOUR.targets_BS,
        positions_BS,
        segments_BS,
        BATCH_OF_FOUR.domains_B,
        BATCH_OF_FOUR.valid_B,
    )
    found = logits(model, batch).reshape(BATCH, LENGTH, VOCAB)
    close(found[1, :3], found[0, 3:6], 2e-6)


def test_a_shorter_sequence_has_the_same_logits():
    model = PanguSigma(small_config())
    short = Batch(
        *[
            a[:, :5].copy()
            for a in (
                BATCH_OF_FOUR.tokens_BS,
                BATCH_OF_FOUR.targets_BS,
                BATCH_OF_FOUR.positions_BS,
                BATCH_OF_FOUR.segments_BS,
            )
        ],
        BATCH_OF_FOUR.domains_B,
        BATCH_OF_FOUR.valid_B,
    )
    close(
        logits(model, short).reshape(BATCH, 5, VOCAB),
        logits(model).reshape(BATCH, LENGTH, VOCAB)[:, :5],
        2e-6,
    )


# modes, dropout, precision


@pytest.mark.parametrize(
    ("capacity", "settings"),
    [
        (DROPLESS, {"moe": {"router": "switch", "z_loss": 0.1}}),
        (3, {"train": {"recompute": True}}),
        (DROPLESS, {"model": {"num_moe_layers": 0}}),
    ],
    ids=["dropless switch", "recomputed locmoe with drops", "dense"],
)
def test_the_compiled_model_equals_the_uncompiled_one(capacity, settings):
    """With dropout, on two nodes.

    Recomputation must change nothing: no router loss twice, the same dropout.
    """
    settings = {
        **settings,
        "model": {"dropout": 0.1, **settings.get("model", {})},
        "parallel": {"nodes": 2},
    }
    config = small_config(**settings)
    plain = small_config(**{**settings, "train": {"recompute": False}})
    loss, found = gradients(PanguSigma(config), config, capacity, jit=True)
    wanted_loss, wanted = gradients(PanguSigma(plain), plain, capacity)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert found.keys() == wanted.keys()
    for name in wanted:
        close(found[name], wanted[name], 5e-6)


def test_dropout_is_for_training_only_and_follows_the_step():
    dropped = PanguSigma(small_config(model={"dropout": 0.2}))
    plain = PanguSigma(small_config())
    np.testing.assert_array_equal(logits(dropped), logits(plain))
    first = logits(dropped, training=True)
    np.testing.assert_array_equal(logits(dropped, training=True), first)
    assert np.abs(logits(dropped, training=True, step=2) - first).max() > 0.1
    assert np.abs(logits(plain) - first).max() > 0.1


def test_half_precision_is_close_and_its_logits_are_fp32():
    """Hash, because a rounded gate may choose another expert.

    A few roundings of each of three layers add up.
    """
    digits = 2**-11
    exact = logits(PanguSigma(small_config(moe={"router": "hash"})))
    rounded = logits(PanguSigma(small_config(moe={"router": "hash"}, train={"precision": "fp16"})))
    assert rounded.dtype == np.float32
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert digits / 8 < error < 8 * digits


# statistics and idle experts


def test_statistics():
    config = small_config(model={"num_layers": 4, "num_moe_layers": 2}, parallel={"nodes": 2})
    model = PanguSigma(config)
    _, stats = model(*inputs(BATCH_OF_FOUR), keys(), (2, DROPLESS), True)
    assert stats["load_LNE"].shape == (2, 2, 4)
    np.testing.assert_array_equal(
        stats["load_LNE"].asnumpy().sum(2), np.full((2, 2), BATCH * LENGTH / 2)
    )
    load_LE = stats["load_LNE"].asnumpy().sum(1)
    np.testing.assert_array_equal(
        stats["dropped_LE"].asnumpy(), [np.maximum(load_LE[0] - 2, 0), np.zeros(4)]
    )
    assert stats["cosine_LT"].shape == (2, BATCH * LENGTH)
    assert stats["layer_sums"].shape == (4,)
    assert set(stats) == set(model.stats_names)


@pytest.mark.parametrize("moe_layers, router", [(0, "locmoe"), (1, "hash"), (1, "locmoe_plus")])
def test_the_names_of_the_statistics(moe_layers, router):
    config = small_config(model={"num_moe_layers": moe_layers}, moe={"router": router})
    model = PanguSigma(config)
    _, stats = model(*inputs(BATCH_OF_FOUR), keys(), (8,) * moe_layers, True)
    assert set(stats) == set(model.stats_names)
    dense = PanguSigma(small_config(model={"num_moe_layers": 0}))
    none = ()
    assert set(dense(*inputs(BATCH_OF_FOUR), keys(), none, True)[1]) == {
        "balance_loss",
        "locality_loss",
        "z_loss",
        "layer_sums",
    }


def test_training_goes_on_with_an_expert_that_gets_no_tokens():
    config = small_config(moe={"router": "hash"}, train={"mode": "pynative", "weight_decay": 0.5})
    model = PanguSigma(config)
    layer = model.blocks[1].moe
    layer.router.table.set_data(integers(np.array([0, 1, 3])[np.arange(VOCAB) % 3]))
    start = layer.experts.w_in.asnumpy().copy()  # the update is in place
    stepper = LocalStepper(model, config, capacities=(DROPLESS,))
    losses = []
    for step in range(1, 5):
        result = stepper(BATCH_OF_FOUR, step, 0.01)
        losses.append(result.losses["loss"])
        assert result.load_LNE[0, :, 2].sum() == 0
        assert math.isfinite(result.grad_norm)
    assert losses[-1] < losses[0] - 0.1
    w_in = layer.experts.w_in.asnumpy()
    # the idle expert only decays, by 1 - 0.01 * 0.5 a step; the others learn
    np.testing.assert_allclose(w_in[2], start[2] * 0.995**4, rtol=2e-6)
    for expert in (0, 1, 3):
        assert np.abs(w_in[expert] - start[expert] * 0.995**4).max() > 0.01
