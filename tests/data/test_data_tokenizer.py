from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pangu_locmoe.data.tokenizer import StreamDecoder, Tokenizer
from pangu_locmoe.errors import DataError


@pytest.mark.parametrize("text", ["", "<eod>", "a<eod>b<eod>", "中文 mixed テキスト é\r\n\t\0", "😀👨‍👩‍👧", "  spaces   ", "一" * 1000])
def test_loses_nothing_and_no_text_spells_the_end(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@given(text=st.text())
def test_any_text_round_trips_and_streams(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.feed, ids)) + stream.flush() == text


@given(text=st.text(alphabet=st.sampled_from("a é中😀龘"), max_size=30), seed=st.integers(0, 99))
def test_stream_never_shows_a_part_of_a_character(tokenizer: Tokenizer, text: str, seed: int) -> None:
    """Any split into tokens, here single bytes mixed with the tokenizer's own tokens."""
    byte = {tokenizer.bytes_of(i): i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes[i] == 1}
    rng = random.Random(seed)
    ids = [
        i
        for token in tokenizer.encode(text)
        for i in ([token] if rng.random() < 0.5 else [byte[bytes([b])] for b in tokenizer.bytes_of(token)])
    ]
    stream = StreamDecoder(tokenizer)
    shown = ""
    for token in ids:
        shown += stream.feed(token)
        assert text.startswith(shown)
    assert shown == text and stream.flush() == ""


def test_stream_is_decode_even_for_bytes_that_are_no_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    ids = [rng.randrange(tokenizer.vocab_size + 5) for _ in range(500)]
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


def test_end_of_document_has_no_text_and_every_byte_is_a_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_document == 0 and tokenizer.token_bytes[0] == 0
    assert {tokenizer.bytes_of(i) for i in range(tokenizer.vocab_size)} >= {bytes([b]) for b in range(256)}
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size == 400


def test_han_runs_are_not_mixed_with_other_text() -> None:
    trained = Tokenizer.train(["x中文y"] * 50, 300)
    assert not any(b"x" in trained.bytes_of(i) and len(trained.bytes_of(i)) > 1 for i in range(trained.vocab_size))


def test_training_is_repeatable_and_may_find_fewer_merges() -> None:
    texts = ["ab ab cd"] * 3
    first, second = Tokenizer.train(texts, 1000), Tokenizer.train(texts, 1000)
    assert first.vocab_size == second.vocab_size < 300
    assert first.encode("ab cd") == second.encode("ab cd")


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json", 400)
    assert loaded.encode("专家 <eod> router") == tokenizer.encode("专家 <eod> router")
    assert loaded.end_of_document == 0
    with pytest.raises(DataError, match=r"400 tokens.*399"):
        Tokenizer.load(tmp_path / "t.json", 399)


def test_unusable_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t.json")
    values = json.loads((tmp_path / "t.json").read_text())
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad.json: not a tokenizer.json"):
        Tokenizer.load(tmp_path / "bad.json")
    values["added_tokens"] = []
    del values["model"]["vocab"]["<eod>"]
    (tmp_path / "none.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="no <eod>"):
        Tokenizer.load(tmp_path / "none.json")


def test_half_characters_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogates"):
        tokenizer.encode("\ud800")
