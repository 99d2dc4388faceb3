"""Encoded by the word, a text has the ids of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.texts import make_text

from pangu_locmoe.data import units
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.data.units import UnitEncoder

# Everything that the pieces tell apart, long runs too.
PARTS = [
    *(" ", "\n", "\r\n", "\t", "\u3000", "\u00a0", "\x1c", "\x85", "\u2028", "\u200b", "\v"),
    *("a", "Zebra", "it's", "'ll", "é", "e\u0301", "ß", "中", "文字", "ｶﾞ", "0", "1234", "②", "٣"),
    *("(", ");", "!", "。", "<eod>", "😀", "\u200d", "_", "\x00", "\x7f", "\ufeff"),
    *(" " * 70, "\n" * 70, "x" * 70, ";" * 70, "中" * 70, " \n" * 40, "; " * 3),
]


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    mixed = ["".join(PARTS), *(make_text(domain, i) for domain in ("en", "zh") for i in range(5))]
    return Tokenizer.train(mixed * 3, 700)


@settings(max_examples=300)
@given(texts=st.lists(st.lists(st.sampled_from(PARTS)).map("".join), max_size=4))
def test_the_ids_are_those_of_the_whole_text(own: Tokenizer, texts: list[str]) -> None:
    encoder = UnitEncoder(own)
    for _ in range(2):  # the second time from memory
        assert [ids.tolist() for ids in encoder.encode(texts)] == own.encode_batch(texts)


@given(text=st.text())
def test_of_any_text(own: Tokenizer, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode("utf-8")
    assert UnitEncoder(own).encode([text])[0].tolist() == own.encode(text)


def test_each_unit_is_encoded_once_and_the_memory_is_bounded(
    own: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "_MOST", 50)
    encoder = UnitEncoder(own)
    asked: list[str] = []
    encode = own.encode_batch
    monkeypatch.setattr(own, "encode_batch", lambda new: (asked.extend(new), encode(new))[1])
    text = "one two one two\nthree"
    assert encoder.encode([text, text])[1].tolist() == encode([text])[0]
    assert sorted(asked) == ["\n", " one", " two", "one", "three"]
    for number in range(100):
        encoder.encode([f"word{number:x} and"])
        assert len(encoder._ids_of) <= 52


def test_another_tokenizer_gets_whole_texts(own: Tokenizer, tmp_path) -> None:
    import json

    own.save(tmp_path / "t.json")
    assert Tokenizer.load(tmp_path / "t.json").is_own
    values = json.loads((tmp_path / "t.json").read_text())
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+ \S+|\s"
    (tmp_path / "t.json").write_text(json.dumps(values))
    other = Tokenizer.load(tmp_path / "t.json")
    assert not other.is_own
    texts = ["one two three four", "five\nsix"]
    encoded = UnitEncoder(other).encode(texts)
    assert [ids.tolist() for ids in encoded] == other.encode_batch(texts)
    assert all(ids.dtype == np.int32 for ids in encoded)
