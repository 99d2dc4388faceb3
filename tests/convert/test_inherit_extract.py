"""Dense -> sparse (inherit), and one domain's sub-model out of a sparse one (extract)."""

from __future__ import annotations

import functools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file
from support import tiny
from support.small import small_config

from pangu_locmoe.checkpoint.format import read_config, save_checkpoint
from pangu_locmoe.checkpoint.restore import restore_generator, restore_model
from pangu_locmoe.config import parse_config
from pangu_locmoe.convert.extract import extract, sub_config
from pangu_locmoe.convert.inherit import inherit, training_text
from pangu_locmoe.data.loader import Batch, validation_batches
from pangu_locmoe.data.packing import positions_and_segments
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.errors import CheckpointError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.train.evaluate import evaluate_checkpoint
from pangu_locmoe.train.run import train

# Weights large enough that experts and routers matter.
SIZES = {"num_layers": 4, "init_std": 0.15}


def logits(model, config, batch):
    """[T, V] of a batch without drops, and the model's statistics."""
    key = Tensor(np.zeros(1, np.int32))
    arrays = (batch.tokens_BS, batch.positions_BS, batch.segments_BS, batch.domains_B)
    logits_TV, stats = model(
        *map(Tensor, arrays), (key, key), (DROPLESS,) * config.model.num_moe_layers, False
    )
    return logits_TV.asnumpy(), stats


def validation(config, sequences=2):
    return list(
        validation_batches(
            prepare(config, False), sequences, sequences, config.data.reset_at_document_end
        )
    )


@functools.cache
def dense():
    """A dense checkpoint of random weights, with its configuration."""
    config = tiny.tiny_config(model={**SIZES, "num_moe_layers": 0})
    folder = tiny.corpus() / "dense"
    save_checkpoint(
        folder, config, prepare(config, False).path / "tokenizer.json", PanguSigma(config)
    )
    return folder, config


@functools.cache
def dense_loss():
    return evaluate_checkpoint(dense()[0], 4)["validation_loss"]


def sparse_config(router, **moe):
    return tiny.tiny_config(
        model={**SIZES, "num_moe_layers": 2}, moe={"router": router, **moe}, train={"seed": 7}
    )


@pytest.fixture(scope="module")
def inherited(tmp_path_factory):
    """A function: the folder and the message of the sparse model with this router."""
    folder = tmp_path_factory.mktemp("inherited")

    @functools.cache
    def make(router):
        return folder / router, inherit(dense()[0], sparse_config(router), folder / router)

    return make


def test_with_hash_the_sparse_model_is_the_dense_one(inherited):
    dense_model, dense_config = restore_model(dense()[0])
    model, config = restore_model(inherited("hash")[0])
    assert config == sparse_config("hash")
    for _, batch in validation(config):
        wanted, _ = logits(dense_model, dense_config, batch)
        assert np.abs(wanted).max() > 0.5
        np.testing.assert_allclose(logits(model, config, batch)[0], wanted, atol=1e-5)


@pytest.mark.parametrize("router", ["hash", "switch", "locmoe"])
def test_every_expert_is_the_dense_network(inherited, router):
    """Its output matrix divided by the layer's mean probability where there is a gate; all the
    rest as it was.
    """
    folder, message = inherited(router)
    dense_arrays = load_file(dense()[0] / "model.safetensors")
    arrays = load_file(folder / "model.safetensors")
    means = [1.0, 1.0]
    if router != "hash":
        means = [float(text) for text in message.split("mean probabilities ")[1].split(", ")]
        assert all(0.25 < mean < 1 for mean in means)
    for name, array in arrays.items():
        if ".experts." in name:
            block, _, rest = name.partition(".moe.experts.")
            weight = rest.split(".")[1]
            mean = means[int(block.split(".")[1]) - 1] if weight == "w_out" else 1.0
            # The message has four decimals.
            np.testing.assert_allclose(
                array * mean,
                dense_arrays[f"{block}.ffn.{weight}"],
                rtol=0 if mean == 1.0 else 3e-4,
                err_msg=name,
            )
        elif ".router." not in name:
            np.testing.assert_array_equal(array, dense_arrays[name], err_msg=name)


@pytest.mark.parametrize("router", ["switch", "locmoe"])
def test_the_mean_is_that_of_the_routers_probabilities(inherited, router):
    """The division and the probability cancel on average: at the dense model's hidden states the
    first layer's ratio is 1.
    """
    folder, _ = inherited(router)
    model, config = restore_model(folder)
    # The calibration's own texts; hidden states of the first sparse layer are the dense model's.
    prepared = prepare(config, False)
    weights = []
    tokens = []
    for domain, tokens_BS in training_text(prepared, 3):
        positions_BS, segments_BS = positions_and_segments(
            tokens_BS, prepared.tokenizer.end_of_document, config.data.reset_at_document_end
        )
        batch = Batch(
            tokens_BS,
            tokens_BS,
            positions_BS,
            segments_BS,
            np.full(len(tokens_BS), domain, np.int32),
            np.ones(len(tokens_BS), bool),
        )
        weights.append(logits(model, config, batch)[1]["weight_L"].asnumpy())
        tokens.append(tokens_BS.size)
    scale = (
        load_file(dense()[0] / "model.safetensors")["blocks.1.ffn.w_out"]
        / load_file(folder / "model.safetensors")["blocks.1.moe.experts.0.w_out"]
    )
    assert scale.std() < 1e-5
    np.testing.assert_allclose(
        np.average(weights, axis=0, weights=tokens)[0], scale.mean(), rtol=1e-4
    )


def test_the_calibrations_text_is_training_text_without_padding():
    """Sequences of all lengths of each domain's training side, spread over it, none of them
    padded.
    """
    prepared = prepare(sparse_config("switch"), False)
    end = prepared.tokenizer.end_of_document
    rows = [
        (domain, tuple(row))
        for domain, tokens_BS in training_text(prepared, 3)
        for row in tokens_BS.tolist()
    ]
    for domain, available in enumerate(prepared.num_sequences["train"]):
        own = [row for other, row in rows if other == domain]
        sides = {
            split: prepared.sequences(split, domain, range(prepared.num_sequences[split][domain]))[
                :, :-1
            ].tolist()
            for split in ("train", "validation")
        }
        assert len(own) == min(16, available)
        assert all(
            row[-1] != end and any(tuple(whole[: len(row)]) == row for whole in sides["train"])
            for row in own
        )
        assert sum(len(row) for row in own) >= 16 * 30 or available < 16
    padding = np.array([[end, 5, 6, end, end], [5, 6, 7, 8, end], [end] * 5])
    padded = SimpleNamespace(
        tokenizer=prepared.tokenizer,
        num_sequences={"train": [3]},
        sequences=lambda split, domain, numbers: padding[numbers],
    )
    assert [tokens_BS.tolist() for _, tokens_BS in training_text(padded, 3)] == [
        [[end]],
        [[end, 5, 6]],
        [[5, 6, 7, 8]],
    ]


@pytest.mark.parametrize(
    "router", ["switch", "locmoe", pytest.param("locmoe_plus", marks=pytest.mark.slow)]
)
def test_with_a_gate_the_loss_is_near_the_dense_ones(inherited, router):
    """Much nearer than without the division, which leaves the experts' part of the sum at a half
    or a third.
    """
    config = sparse_config(router)
    wanted = dense_loss()
    row = evaluate_checkpoint(inherited(router)[0], 4)
    assert row["validation_loss"] == pytest.approx(wanted, abs=0.05)
    dense_model, dense_config = restore_model(dense()[0])
    model, _ = restore_model(inherited(router)[0])
    undivided = PanguSigma(config)
    for own, other in zip(undivided.get_parameters(), model.get_parameters()):
        own.set_data(other.value())
    for index in (1, 2):
        own = undivided.blocks[index].moe.experts.w_out
        other = dense_model.blocks[index].ffn.w_out
        own.set_data(Tensor(np.broadcast_to(other.asnumpy(), own.shape).copy()))
    distances = np.zeros(2)
    for _, batch in validation(config):
        target, _ = logits(dense_model, dense_config, batch)
        distances += [
            np.square(logits(m, config, batch)[0] - target).mean() for m in (model, undivided)
        ]
    assert distances[0] < 0.5 * distances[1]


def test_a_job_inherits_what_one_process_does(inherited, tmp_path):
    """Its static exchange and its nodes are for training."""
    job = {"expert_parallel": 2, "nodes": 2, "sizes": "static"}
    config = tiny.tiny_config(
        model={**SIZES, "num_moe_layers": 2},
        moe={"router": "hash", "capacity": {"local_factor": 2.0, "remote_factor": 1.0}},
        train={"seed": 7},
        parallel=job,
    )
    inherit(dense()[0], config, tmp_path / "new")
    assert read_config(tmp_path / "new") == config
    wanted, got = (
        load_file(folder / "model.safetensors")
        for folder in (inherited("hash")[0], tmp_path / "new")
    )
    assert wanted.keys() == got.keys() and all(
        np.array_equal(wanted[name], got[name]) for name in wanted
    )


def test_a_bf16_checkpoint_is_restored_in_fp32(inherited, tmp_path):
    """Its weights are fp32; only what CPUs cannot compute in is changed."""
    shutil.copytree(inherited("hash")[0], tmp_path / "bf16")
    config = read_config(tmp_path / "bf16")
    train_ = config.train.model_copy(update={"precision": "bf16"})
    (tmp_path / "bf16" / "config.yaml").write_text(
        config.model_copy(update={"train": train_}).to_yaml(), encoding="utf-8"
    )
    model, restored = restore_model(tmp_path / "bf16")
    assert restored.train.precision == "fp32" and restored.model_copy(
        update={"train": train_}
    ) == read_config(tmp_path / "bf16")
    wanted, _ = restore_model(inherited("hash")[0])
    for own, other in zip(model.get_parameters(), wanted.get_parameters()):
        np.testing.assert_array_equal(own.asnumpy(), other.asnumpy(), err_msg=own.name)


def test_a_checkpoint_without_its_tokenizer_is_not_evaluated(inherited, tmp_path):
    shutil.copytree(inherited("hash")[0], tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing: "):
        evaluate_checkpoint(tmp_path / "copy", 1)


def test_an_inherited_model_can_be_trained(inherited, tmp_path):
    config = sparse_config("hash").model_copy(
        update={"train": tiny.tiny_config(train={"steps": 2, "warmup_steps": 0}).train}
    )
    assert train(config, tmp_path / "run", init_from=inherited("hash")[0], progress=False) is None


def test_inheriting_refuses(inherited, tmp_path):
    folder, _ = dense()
    with pytest.raises(CheckpointError, match=r"^--output .*: exists already$"):
        inherit(folder, sparse_config("hash"), tmp_path)
    with pytest.raises(CheckpointError, match="is neither a checkpoint nor a run directory"):
        inherit(tmp_path, sparse_config("hash"), tmp_path / "new")
    with pytest.raises(
        CheckpointError,
        match=r"has no blocks\.1\.ffn\.w_in, which blocks\.1\.moe\.experts\.0\.w_in should inherit",
    ):
        inherit(inherited("hash")[0], sparse_config("hash"), tmp_path / "new")
    deeper = tiny.tiny_config(
        model={**SIZES, "num_layers": 5, "num_moe_layers": 2}, moe={"router": "hash"}
    )
    with pytest.raises(CheckpointError, match=r"has no blocks\.3\."):
        inherit(folder, deeper, tmp_path / "new")
    shallower = tiny.tiny_config(
        model={**SIZES, "num_layers": 3, "num_moe_layers": 2}, moe={"router": "hash"}
    )
    with pytest.raises(
        CheckpointError,
        match=r"has blocks\.2\..*, which has no place in the sparse model; is it dense, and as deep\?",
    ):
        inherit(folder, shallower, tmp_path / "new")
    wider = tiny.tiny_config(
        model={**SIZES, "num_moe_layers": 2, "ffn_size": 80}, moe={"router": "hash"}
    )
    with pytest.raises(CheckpointError, match=r"the shape \[32, 64\], not \[32, 80\]"):
        inherit(folder, wider, tmp_path / "new")
    assert not list(tmp_path.iterdir())


# Extraction. The whole model has unequal groups, the middle one in the middle: en 1, zh 3, code 4
# of 8 experts.


# Tables and biases of their own, which are cut; zh's experts are of two node groups.
MORE = {
    ("local_hash", False): {"node_groups": 4, "balance": "quantile"},
    ("switch", True): {"token_prior": 2.0, "learn_token_prior": True, "balance": "bias"},
    ("locmoe", False): {"token_prior": 2.0, "node_groups": 4, "balance": "quantile"},
    ("locmoe", True): {"shared_experts": 1},
}


def two_level_config(router, embeddings):
    return tiny.tiny_config(
        model={**SIZES, "num_moe_layers": 2, "domain_embeddings": embeddings},
        moe={
            "router": router,
            "num_experts": 8,
            "levels": 2,
            "group_sizes": {"en": 1, "zh": 3, "code": 4},
            **MORE.get((router, embeddings), {}),
        },
        parallel={"nodes": 2},
        data={"mixture": {"en": 1, "zh": 1, "code": 1}},
    )


@functools.cache
def whole(router, embeddings):
    config = two_level_config(router, embeddings)
    folder = tiny.corpus() / f"whole-{router}-{embeddings}"
    prepared = prepare(config, False)
    model = PanguSigma(config, prepared.token_counts)
    random = np.random.default_rng(5)
    for parameter in model.get_parameters():
        if parameter.name.endswith(("router.bias", "prior.beta")):
            values = random.normal(1.0, 0.3, parameter.shape).astype(np.float32)
            parameter.set_data(Tensor(values))
    save_checkpoint(folder, config, prepared.path / "tokenizer.json", model)
    return folder


@pytest.mark.parametrize(
    "router, embeddings, domain, held",
    [
        ("hash", False, "zh", 3),
        ("hash", True, "code", 4),
        ("switch", False, "code", 4),
        ("switch", True, "zh", 3),
        ("locmoe", False, "zh", 3),
        ("locmoe", True, "code", 4),
        ("locmoe_plus", False, "code", 4),
        ("locmoe_plus", True, "zh", 3),
        ("local_hash", False, "zh", 3),
        ("local_hash", True, "code", 4),
    ],
)
def test_the_part_gives_the_whole_models_logits(tmp_path, router, embeddings, domain, held):
    folder = whole(router, embeddings)
    extract(folder, domain, tmp_path / "part")
    model, config = restore_model(folder)
    part, part_config = restore_model(tmp_path / "part")
    assert part_config.domains == (domain,) and part_config.moe.num_experts == held
    assert sum(p.size for p in part.trainable_params()) < sum(
        p.size for p in model.trainable_params()
    )
    index = config.domains.index(domain)
    used = np.zeros(held)
    for of, batch in validation(config, 4):
        if of == index:
            wanted, _ = logits(model, config, batch)
            batch.domains_B[:] = 0
            got, stats = logits(part, part_config, batch)
            np.testing.assert_allclose(got, wanted, atol=1e-5)
            used += stats["load_LNE"].asnumpy().sum((0, 1))
    # The comparison went through more than one expert.
    assert (used > 0).sum() > 1


@pytest.mark.slow
def test_a_part_is_evaluated_and_continues_text(tmp_path, capsys):
    """Evaluation uses the tokenizer of the whole model, not one of the part's text."""
    folder = whole("locmoe", True)
    message = extract(folder, "zh", tmp_path / "part")
    assert message == f"{tmp_path / 'part'}: domain zh, experts 1 to 3 of 8"
    part = evaluate_checkpoint(tmp_path / "part", 4)
    wanted = evaluate_checkpoint(folder, 4)
    assert part["validation_loss_by_domain"]["zh"] == pytest.approx(
        wanted["validation_loss_by_domain"]["zh"], abs=1e-5
    )
    assert part["bits_per_byte_by_domain"]["zh"] == pytest.approx(
        wanted["bits_per_byte_by_domain"]["zh"], abs=1e-5
    )
    sample = tiny.tiny_config(sample={"tokens": 5, "temperature": 0.0}).sample
    assert restore_generator(tmp_path / "part")(["专家"], [0], sample, 1) == restore_generator(
        folder
    )(["专家"], [1], sample, 1)


@pytest.mark.parametrize(
    "job",
    [
        {
            "parallel": {"expert_parallel": 2, "sizes": "static"},
            "moe": {"capacity": {"local_factor": 2.0, "remote_factor": 1.0}},
        },
        {"parallel": {"expert_parallel": 2}, "placement": {"policy": "locality"}},
    ],
    ids=["static", "placement"],
)
def test_a_part_of_a_jobs_model_has_a_configuration_that_loads(job):
    part = sub_config(small_config(**job), "zh", range(2, 4))
    assert parse_config(part.model_dump(mode="json")) == part


def test_extracting_refuses(inherited, tmp_path):
    with pytest.raises(CheckpointError, match=r"^--output .*: exists already$"):
        extract(whole("hash", False), "zh", tmp_path)
    with pytest.raises(CheckpointError, match=r"^--domain klingon: the model knows en, zh, code$"):
        extract(whole("hash", False), "klingon", tmp_path / "part")
    with pytest.raises(
        CheckpointError, match="routes on one level: its experts belong to all domains"
    ):
        extract(inherited("hash")[0], "zh", tmp_path / "part")
    with pytest.raises(CheckpointError, match="is neither a checkpoint nor a run directory"):
        extract(tmp_path, "zh", tmp_path / "part")
    assert not list(tmp_path.iterdir())
