from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from pangu_locmoe.data.tokenizer import StreamDecoder, Tokenizer
from pangu_locmoe.errors import DataError


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<eod>",
        "a<eod>b<eod>",
        "中文 mixed テキスト é\r\n\t\0",
        "😀👨‍👩‍👧",
        "  spaces   ",
        "一" * 1000,
    ],
)
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
def test_stream_never_shows_a_part_of_a_character(
    tokenizer: Tokenizer, text: str, seed: int
) -> None:
    """Any split into tokens, here single bytes mixed with the tokenizer's own tokens."""
    byte = {
        tokenizer.bytes_of(i): i
        for i in range(tokenizer.vocab_size)
        if tokenizer.token_bytes[i] == 1
    }
    rng = random.Random(seed)
    ids = [
        i
        for token in tokenizer.encode(text)
        for i in (
            [token] if rng.random() < 0.5 else [byte[bytes([b])] for b in tokenizer.bytes_of(token)]
        )
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
    assert {tokenizer.bytes_of(i) for i in range(tokenizer.vocab_size)} >= {
        bytes([b]) for b in range(256)
    }
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size == 400


def test_han_runs_are_not_mixed_with_other_text() -> None:
    trained = Tokenizer.train(["x中文y"] * 50, 300)
    assert not any(
        b"x" in trained.bytes_of(i) and len(trained.bytes_of(i)) > 1
        for i in range(trained.vocab_size)
    )


def test_training_is_repeatable_and_may_find_fewer_merges() -> None:
    texts = ["ab ab cd"] * 3
    first = Tokenizer.train(texts, 1000)
    second = Tokenizer.train(texts, 1000)
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


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def changed(tokenizer: Tokenizer, tmp_path: Path, change: Any) -> Path:
    """A tokenizer.json with some keys replaced; `change` may be a pre-tokenizer stage, an added
    token's settings or keys.
    """
    tokenizer.save(tmp_path / "t.json")
    values = json.loads((tmp_path / "t.json").read_text())
    if "stage" in change:
        values["pre_tokenizer"]["pretokenizers"].insert(0, change["stage"])
    elif "content" in change:
        plain = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
        values["added_tokens"].append({"id": len(values["model"]["vocab"]), **plain, **change})
    elif "model" in change:
        values["model"].update(change["model"])
    else:
        values.update(change)
    (tmp_path / "changed.json").write_text(json.dumps(values))
    return tmp_path / "changed.json"


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<eod>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<eod>": {"id": "<eod>", "ids": [0], "tokens": ["<eod>"]}},
}


@pytest.mark.parametrize(
    "change, name",
    [
        (
            {
                "truncation": {
                    "direction": "Right",
                    "max_length": 4,
                    "strategy": "LongestFirst",
                    "stride": 0,
                }
            },
            "truncation",
        ),
        (
            {
                "padding": {
                    "strategy": "BatchLongest",
                    "direction": "Left",
                    "pad_to_multiple_of": 8,
                    "pad_id": 7,
                    "pad_type_id": 0,
                    "pad_token": "#",
                }
            },
            "padding",
        ),
        ({"model": {"dropout": 0.5}}, "model dropout"),
        ({"post_processor": TEMPLATE}, "post_processor"),
        (
            {"stage": {**BYTE_LEVEL, "add_prefix_space": True}},
            "pre_tokenizer ByteLevel add_prefix_space",
        ),
        ({"content": "router", "lstrip": True}, "added token 'router' lstrip"),
        ({"content": "专家", "rstrip": True, "special": True}, "added token '专家' rstrip"),
    ],
)
def test_what_cuts_fills_or_varies_is_switched_off(
    tokenizer: Tokenizer, tmp_path: Path, change: Any, name: str
) -> None:
    if "stage" in change:  # in place of the one that is there, as ByteLevel is not done twice
        tokenizer.save(tmp_path / "t.json")
        change = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [change["stage"]]}}
    loaded = Tokenizer.load(changed(tokenizer, tmp_path, change))
    assert loaded.switched_off == [name]
    for texts in (
        ["the  router  专家 \n", "a much longer text about the experts of the cluster " * 5],
        ["x"],
    ):
        ids = loaded.encode_batch(texts)
        assert [loaded.decode(each) for each in ids] == texts and loaded.encode_batch(texts) == ids
    loaded.save(tmp_path / "again.json")
    assert Tokenizer.load(tmp_path / "again.json").switched_off == []


@pytest.mark.parametrize(
    "change, name",
    [
        *[
            ({"normalizer": {"type": kind}}, f"normalizer {kind}")
            for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt")
        ],
        (
            {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
            "normalizer Strip",
        ),
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, "normalizer Prepend"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}},
            "normalizer Replace",
        ),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}],
                }
            },
            "normalizer NFC, normalizer Lowercase",
        ),
        *[
            ({"stage": {"type": kind}}, f"pre_tokenizer {kind}")
            for kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
        ],
        ({"stage": {"type": "Punctuation", "behavior": "Removed"}}, "pre_tokenizer Punctuation"),
        (
            {
                "stage": {
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "Removed",
                    "invert": False,
                }
            },
            "pre_tokenizer Split",
        ),
        (
            {
                "stage": {
                    "type": "Metaspace",
                    "replacement": "▁",
                    "prepend_scheme": "always",
                    "split": True,
                }
            },
            "pre_tokenizer Metaspace",
        ),
        (
            {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
            "pre_tokenizer without ByteLevel",
        ),
        ({"model": {"continuing_subword_prefix": "##"}}, "model continuing_subword_prefix '##'"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "model end_of_word_suffix '</w>'"),
    ],
)
def test_what_changes_text_is_refused_and_named(
    tokenizer: Tokenizer, tmp_path: Path, change: Any, name: str
) -> None:
    with pytest.raises(DataError, match=re.escape(name)) as refused:
        Tokenizer.load(changed(tokenizer, tmp_path, change))
    assert "\n" not in str(refused.value) and "changed.json" in str(refused.value)


def test_what_only_some_text_shows_is_refused_when_it_comes(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rare = {"type": "Replace", "pattern": {"String": "zebra"}, "content": "horse"}
    loaded = Tokenizer.load(changed(tokenizer, tmp_path, {"normalizer": rare}))
    with pytest.raises(
        DataError, match=r"normalizer Replace \('a zebra' comes back as 'a horse'\)"
    ):
        loaded.encode("a zebra")


@pytest.mark.parametrize("content", ["routers", " of the ", "中国", "é中", "   "])
def test_added_tokens_stand_for_their_characters(
    tokenizer: Tokenizer, tmp_path: Path, content: str
) -> None:
    loaded = Tokenizer.load(changed(tokenizer, tmp_path, {"content": content}))
    text = f"x{content}y {content} z"
    assert 400 in loaded.encode(text) and loaded.decode(loaded.encode(text)) == text
    assert loaded.bytes_of(400) == content.encode()


@pytest.mark.parametrize(
    "unit", ["a", "中", "あ", "1", "-", " ", "\n", "\r\n", "\t", "😀", "\u0301", "ab", " -"]
)
def test_training_takes_no_longer_on_text_without_breaks(unit: str) -> None:
    """A run of 400,000 took minutes when a piece could be as long as the text."""
    text = unit * (400_000 // len(unit.encode()))
    trained = Tokenizer.train([text, "hello world " * 50], 300)
    assert max(map(len, pieces_of(trained, text[:5000]))) <= 130
    assert "".join(pieces_of(trained, text[:5000])) == text[:5000]


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the pattern alone makes of a text."""
    pattern = Split(
        Regex(
            json.loads(tokenizer._backend.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"][
                "Regex"
            ]
        ),
        "isolated",
    )
    return [piece for piece, _ in pattern.pre_tokenize_str(text)]
