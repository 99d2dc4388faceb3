"""Text from a model: the draw of one token against NumPy, and whole continuations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mindspore import Tensor
from support import tiny

from pangu_locmoe.config import SampleConfig
from pangu_locmoe.data.packing import positions_and_segments
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.errors import DataError
from pangu_locmoe.generate import Generator, choose, domain_index, read_prompts
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.capacity import DROPLESS

GREEDY = SampleConfig(tokens=12, temperature=0)
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12).map(
    lambda values: np.array(values, np.float32)
)


def kept_probabilities(logits_V: np.ndarray, sample: SampleConfig) -> dict[int, float]:
    """The tokens that may be drawn and how likely each is: a plain loop over the sorted tokens,
    in float64.
    """
    # By logit: exponentials of different logits may be the same number.
    best = sorted(((float(value), -token) for token, value in enumerate(logits_V)), reverse=True)[
        : sample.top_k or None
    ]
    ranked = [
        (float(np.exp(np.float64(value) / sample.temperature)), negative)
        for value, negative in best
    ]
    total = sum(weight for weight, _ in ranked)
    kept: dict[int, float] = {}
    for weight, negative in ranked:
        if kept and sum(kept.values()) / total >= sample.top_p:
            break
        kept[-negative] = weight
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@example(np.array([-5.9e-23, 0.0], np.float32), 0.5, 0, 0.013, 0)
@settings(max_examples=60, deadline=None)
@given(
    LOGITS,
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0, 1, 2, 3, 50]),
    st.sampled_from([0.013, 0.37, 0.71, 1.0]),
    st.integers(0, 2**31),
)
def test_draws_come_from_the_kept_tokens(logits_V, temperature, top_k, top_p, seed):
    sample = SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    kept = kept_probabilities(logits_V, sample)
    generator = np.random.default_rng(seed)
    assert {choose(logits_V, sample, generator) for _ in range(30)} <= set(kept)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.8), (4, 0.7), (1, 1.0)])
def test_draws_come_as_often_as_they_should(top_k, top_p):
    logits_V = np.array([1.0, -2.0, 2.5, 0.0, 2.0, -1.0], np.float32)
    sample = SampleConfig(temperature=0.7, top_k=top_k, top_p=top_p)
    kept = kept_probabilities(logits_V, sample)
    generator = np.random.default_rng(3)
    drawn = (
        np.bincount([choose(logits_V, sample, generator) for _ in range(4000)], minlength=6) / 4000
    )
    wanted = np.array([kept.get(token, 0.0) for token in range(6)])
    # Four standard deviations of a share of 4000 draws.
    np.testing.assert_allclose(drawn, wanted, atol=4 * np.sqrt(0.25 / 4000))
    assert (drawn > 0).sum() == len(kept)


@given(LOGITS, st.integers(0, 50), st.floats(0.01, 1))
def test_temperature_0_takes_the_likeliest(logits_V, top_k, top_p):
    assert (
        choose(
            logits_V,
            SampleConfig(temperature=0, top_k=top_k, top_p=top_p),
            np.random.default_rng(0),
        )
        == logits_V.argmax()
    )


def test_the_likeliest_always_stays():
    logits_V = np.zeros(5, np.float32)
    assert (
        choose(
            logits_V, SampleConfig(temperature=1.0, top_k=0, top_p=1e-9), np.random.default_rng(0)
        )
        == 0
    )


def test_large_logits_do_not_overflow():
    assert (
        choose(
            np.array([1e4, -1e4], np.float32),
            SampleConfig(temperature=0.01),
            np.random.default_rng(0),
        )
        == 0
    )


@pytest.fixture(scope="module")
def config():
    return tiny.tiny_config(model={"init_std": 0.3}, moe={"router": "switch"})


@pytest.fixture(scope="module")
def model(config):
    return PanguSigma(config)


@pytest.fixture(scope="module")
def generator(config, model):
    return Generator(model, config, prepare(config, False).tokenizer)


def likeliest(config, model, tokenizer, prompt: str, domain: int, count: int) -> list[int]:
    """The likeliest tokens after a prompt by whole passes over exactly the text so far, while it
    fits the window.
    """
    window = [tokenizer.end_of_document, *tokenizer.encode(prompt)]
    key = Tensor(np.zeros(1, np.int32))
    start = len(window)
    for _ in range(count):
        tokens_BS = np.array([window], np.int32)
        positions_BS, segments_BS = positions_and_segments(
            tokens_BS, tokenizer.end_of_document, config.data.reset_at_document_end
        )
        arrays = (tokens_BS, positions_BS, segments_BS, np.array([domain], np.int32))
        logits_TV, _ = model(*map(Tensor, arrays), (key, key), (DROPLESS,), False)
        window.append(int(logits_TV.asnumpy()[-1, : tokenizer.vocab_size].argmax()))
        if window[-1] == tokenizer.end_of_document:
            break
    return window[start:]


@pytest.mark.parametrize("prompt", ["the router sends", "路由把每个", ""])
def test_temperature_0_is_the_argmax_at_every_position(config, model, generator, prompt):
    tokens = likeliest(config, model, generator.tokenizer, prompt, 1, 6)
    sample = SampleConfig(tokens=6, temperature=0)
    assert (
        generator([prompt], [1], sample, 1)
        == generator([prompt], [1], sample, 2)
        == [generator.tokenizer.decode(tokens)]
    )


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_prompt_beside_others_is_continued_as_alone(generator, temperature):
    """In any place, of a text that outgrows its window too."""
    prompts = ["the router", "每个词元", "the router sends every token to the", ""]
    sample = SampleConfig(tokens=30, temperature=temperature, top_k=0, top_p=1.0)

    def together(order: list[int]) -> dict[int, str]:
        pieces = generator.stream([prompts[i] for i in order], [i % 3 for i in order], sample, 7)
        return dict(zip(order, map("".join, zip(*pieces))))

    joint = together([0, 1, 2, 3])
    assert joint == together([3, 1, 0, 2]) == {i: together([i])[i] for i in range(4)}
    assert generator(prompts, [0, 1, 2, 0], sample, 7) == list(joint.values())


def test_two_streams_of_one_generator_do_not_meet(generator):
    sample = SampleConfig(tokens=5, temperature=1.0)
    streams = [generator.stream([prompt], [0], sample, 1) for prompt in ("the", "the router")]
    texts = ["".join(piece for (piece,) in pieces) for pieces in zip(*zip(*streams))]
    assert texts == [generator([prompt], [0], sample, 1)[0] for prompt in ("the", "the router")]


def test_the_seed_fixes_the_text(generator):
    sample = SampleConfig(tokens=20, temperature=1.0, top_k=0, top_p=1.0)
    one, same, other = (generator(["the"], [0], sample, seed)[0] for seed in (1, 1, 2))
    assert one == same != other


def test_the_pieces_are_the_whole(generator):
    """Random bytes of a model that has learned nothing: every character that is not whole yet
    waits for its rest.
    """
    sample = SampleConfig(tokens=40, temperature=2.0, top_k=0, top_p=1.0)
    streamed = list(generator.stream(["专家"], [1], sample, 5))
    assert "".join(piece for (piece,) in streamed) == generator(["专家"], [1], sample, 5)[0]
    assert any(piece == "" for (piece,) in streamed[:-1]) and any(piece for (piece,) in streamed)


def test_a_text_longer_than_the_window_goes_on(config, model):
    """96 tokens from a window of 32, after a prompt that is longer than the window too."""
    seen = []

    class Endless(Generator):
        def _next(self, windows, domains_B):
            seen.append(len(windows[0]))
            logits_BV = super()._next(windows, domains_B)
            logits_BV[:, self.tokenizer.end_of_document] = -np.inf
            return logits_BV

    generator = Endless(model, config, prepare(config, False).tokenizer)
    prompt = "".join(str(number % 10) for number in range(300))
    assert len(generator.tokenizer.encode(prompt)) > 32
    pieces = list(
        generator.stream(
            [prompt], [0], SampleConfig(tokens=96, temperature=1.0, top_k=0, top_p=1.0), 3
        )
    )
    # A step more than tokens, for the rest of a last character. The window keeps its last half when
    # it is full.
    assert len(pieces) == 97 and "".join(piece for (piece,) in pieces)
    assert seen == [16, *[16 + position % 17 for position in range(1, 96)]]


def test_no_tokens_are_no_text(generator):
    assert generator(["the"], [0], SampleConfig(tokens=0), 1) == [""]


def test_a_continuation_ends_with_the_document(config, model):
    """Nothing comes after the end-of-document token, and the others go on."""

    class Scripted(Generator):
        def _next(self, windows, domains_B):
            logits_BV = np.full((len(windows), self.tokenizer.vocab_size), -10.0, np.float32)
            for row, window in zip(logits_BV, windows):
                ended = len(window) == 4 and window[1] == self.tokenizer.encode("a")[0]
                row[self.tokenizer.end_of_document if ended else self.tokenizer.encode("b")[0]] = (
                    10.0
                )
            return logits_BV

    generator = Scripted(model, config, prepare(config, False).tokenizer)
    assert generator(["a", "c"], [0, 0], SampleConfig(tokens=6, temperature=0), 1) == [
        "bb",
        "bbbbbb",
    ]
    assert len(list(generator.stream(["a"], [0], SampleConfig(tokens=6, temperature=0), 1))) == 3


def test_a_file_of_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    for content, prompts in (("a\n\n专家\n", ["a", "", "专家"]), ("\n", [""]), ("a", ["a"])):
        file.write_text(content, encoding="utf-8")
        assert read_prompts(file) == prompts


@pytest.mark.parametrize(
    "content, rule",
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "has no line; must have one for each prompt"),
        (b"\xff\xfe", "must be UTF-8"),
    ],
)
def test_a_file_without_prompts(tmp_path, content, rule):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=rf"^--prompts {file}: {rule}$"):
        read_prompts(file)


def test_domains_by_name(config):
    assert [domain_index(config, name) for name in (None, "en", "zh", "code")] == [0, 0, 1, 2]
    with pytest.raises(DataError, match=r"^--domain klingon: the model knows en, zh, code$"):
        domain_index(config, "klingon")
