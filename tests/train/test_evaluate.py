"""Evaluation against a computation in NumPy from the logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mindspore import Tensor
from support import tiny

from pangu_locmoe.data.loader import validation_batches
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS
from pangu_locmoe.train.evaluate import Evaluator, format_evaluation


@pytest.fixture(scope="module")
def config():
    # Weights large enough that texts differ, and a batch that 5 sequences do not fill.
    return tiny.tiny_config(
        model={"init_std": 0.2, "dropout": 0.3},
        moe={"router": "switch", "jitter": 0.2, "capacity": {"factor": 1.0}},
        parallel={"nodes": 2},
        evaluation={"sequences": 5, "batch_size": 2},
    )


@pytest.fixture(scope="module")
def model(config):
    return PanguSigma(config)


@pytest.fixture(scope="module")
def row(config, model):
    return Evaluator(model, config, prepare(config, False))()


def token_losses(config, model, batch):
    """Negative logarithm of each target's probability, float64 [B, S], without any drop."""
    key = Tensor(np.zeros(1, np.int32))
    arrays = (batch.tokens_BS, batch.positions_BS, batch.segments_BS, batch.domains_B)
    logits_TV, _ = model(*map(Tensor, arrays), (key, key), (DROPLESS,), False)
    logits_TV = logits_TV.asnumpy().astype(np.float64)
    peak_T1 = logits_TV.max(1, keepdims=True)
    log_sum_T = np.log(np.exp(logits_TV - peak_T1).sum(1)) + peak_T1[:, 0]
    targets_T = batch.targets_BS.reshape(-1)
    return (log_sum_T - logits_TV[np.arange(len(targets_T)), targets_T]).reshape(
        batch.targets_BS.shape
    )


@pytest.fixture(scope="module")
def wanted(config, model):
    """(nats per token, bits per byte) of each domain from one sequence at a time."""
    prepared = prepare(config, False)
    tokenizer = prepared.tokenizer
    sums = [[0.0, 0, 0] for _ in tiny.DOMAINS]
    for domain, batch in validation_batches(prepared, 5, 1, True):
        assert batch.valid_B.all()
        sums[domain][0] += token_losses(config, model, batch).sum()
        sums[domain][1] += batch.targets_BS.size
        sums[domain][2] += sum(
            len(tokenizer.bytes_of(token)) for token in batch.targets_BS.reshape(-1).tolist()
        )
    return [(loss / tokens, loss / math.log(2) / size) for loss, tokens, size in sums]


def test_the_loss_of_each_domain(row, wanted):
    assert list(row["validation_loss_by_domain"]) == list(tiny.DOMAINS)
    np.testing.assert_allclose(
        list(row["validation_loss_by_domain"].values()), [loss for loss, _ in wanted], rtol=1e-5
    )
    assert np.ptp([loss for loss, _ in wanted]) > 0.01


def test_bits_per_byte_of_each_domain(row, wanted):
    """All nats over ln 2 and the bytes of the text that was predicted; `<eod>` has none."""
    np.testing.assert_allclose(
        list(row["bits_per_byte_by_domain"].values()), [bits for _, bits in wanted], rtol=1e-5
    )


def test_all_text_weighs_the_domains_by_their_size(config, row, wanted):
    counts = prepare(config, False).counts["validation"]
    tokens, sizes = (
        [counts[domain][unit] for domain in tiny.DOMAINS] for unit in ("tokens", "bytes")
    )
    assert row["validation_loss"] == pytest.approx(
        np.average([loss for loss, _ in wanted], weights=tokens), rel=1e-5
    )
    assert row["bits_per_byte"] == pytest.approx(
        np.average([bits for _, bits in wanted], weights=sizes), rel=1e-5
    )


def test_fewer_sequences_are_measured_alone(config, model, row):
    evaluator = Evaluator(model, config, prepare(config, False))
    fewer = evaluator(1)["validation_loss_by_domain"]
    for domain, batch in validation_batches(prepare(config, False), 1, 1, True):
        assert fewer[tiny.DOMAINS[domain]] == pytest.approx(
            token_losses(config, model, batch).mean(), rel=1e-5
        )
    assert evaluator() == row


def test_the_mode_does_not_matter(config, model, row):
    pynative = config.model_copy(
        update={"train": config.train.model_copy(update={"mode": "pynative"})}
    )
    again = Evaluator(model, pynative, prepare(config, False))()
    assert again["validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-6)


def test_the_table_has_the_bigram_beside_it(row):
    bigram = {"en": 1.25, "zh": 2.25, "code": 3.25, "all": 4.25}
    lines = format_evaluation(row, bigram).splitlines()
    assert lines[0].split() == [
        "loss",
        "perplexity",
        "bits/byte",
        "bigram",
        "documents",
        "sequences",
        "tokens",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["en", "zh", "code", "all"]
    for line in lines[1:4]:
        domain, loss, perplexity, bits, baseline, documents, sequences, tokens = line.split()
        assert float(loss) == pytest.approx(row["validation_loss_by_domain"][domain], abs=6e-4)
        assert float(perplexity) == pytest.approx(
            math.exp(row["validation_loss_by_domain"][domain]), rel=2e-3
        )
        assert float(bits) == pytest.approx(row["bits_per_byte_by_domain"][domain], abs=6e-4)
        assert float(baseline) == bigram[domain]
        assert row["measured_on"][domain] == {
            "documents": int(documents),
            "sequences": int(sequences),
            "tokens": int(tokens),
        }
        assert (int(sequences), int(tokens)) == (5, 5 * 32)
    assert lines[4].split()[1:] == [
        f"{row['validation_loss']:.3f}",
        f"{math.exp(row['validation_loss']):.1f}",
        f"{row['bits_per_byte']:.3f}",
        "4.250",
        str(sum(on["documents"] for on in row["measured_on"].values())),
        "15",
        "480",
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_padding_is_not_text(config, model, batch_size):
    """A side shorter than a sequence: loss and bits per byte are of its own tokens, in whatever
    batch they come.
    """
    short = {"max_bytes_per_domain": 6000, "validation_fraction": 0.01}
    values = {
        **config.model_dump(mode="json"),
        "data": short,
        "evaluation": {"sequences": 5, "batch_size": batch_size},
    }
    config = tiny.tiny_config(**{**values, "train": {"mode": "pynative"}})
    prepared = prepare(config, False)
    row = Evaluator(model, config, prepared)()
    for domain, name in enumerate(tiny.DOMAINS):
        ((_, batch),) = [
            found for found in validation_batches(prepared, 5, 1, True) if found[0] == domain
        ]
        tokens = prepared.counts["validation"][name]["tokens"] - 1
        assert 0 < tokens < config.model.seq_length
        losses = token_losses(config, model, batch)[0, :tokens]
        assert row["measured_on"][name] == {"documents": 1, "sequences": 1, "tokens": tokens}
        assert row["validation_loss_by_domain"][name] == pytest.approx(losses.mean(), rel=1e-5)
        size = prepared.counts["validation"][name]["bytes"]
        assert row["bits_per_byte_by_domain"][name] == pytest.approx(
            losses.sum() / math.log(2) / size, rel=1e-5
        )


def test_the_end_of_a_document_is_a_target(config):
    """Only the padding after the last document is none; `<eod>` between two documents is."""
    prepared = prepare(config, False)
    batches = [batch for _, batch in validation_batches(prepared, 10**6, 1, True)]
    ends = sum(
        int((batch.targets_BS == prepared.tokenizer.end_of_document).sum()) for batch in batches
    )
    assert ends > 3 and all((batch.documents_BS >= 0).all() for batch in batches)
