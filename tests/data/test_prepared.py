from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import make_text

from pangu_locmoe.config import Config
from pangu_locmoe.data import preparing
from pangu_locmoe.data.corpus import scan
from pangu_locmoe.data.identity import differences
from pangu_locmoe.data.loader import BatchLoader, spread, validation_batches
from pangu_locmoe.data.packing import Packer
from pangu_locmoe.data.prepared import Prepared, fingerprint, prepare
from pangu_locmoe.data.sampler import BatchSampler
from pangu_locmoe.errors import DataError

Make = Callable[..., Config]


@pytest.fixture
def prepared(make_config: Make) -> Prepared:
    return prepare(make_config(validation_fraction=0.2), progress=False)


def stream(prepared: Prepared, split: str, domain: int) -> list[int]:
    rows = prepared.sequences(split, domain, range(prepared.num_sequences[split][domain]))
    return [*rows[0, :1].tolist(), *rows[:, 1:].reshape(-1).tolist()]


def test_sequences_are_the_documents(prepared: Prepared, make_config: Make) -> None:
    config = make_config(validation_fraction=0.2)
    documents = list(scan(config.data, config.domains).documents())
    for domain in (0, 1):
        for split in ("train", "validation"):
            expected = [
                t
                for d, s, parts in documents
                if (d, s) == (domain, split)
                for p in parts
                for t in [0, *prepared.tokenizer.encode(p)]
            ]
            got = stream(prepared, split, domain)
            assert got == expected[: len(got)]
            counts = prepared.counts[split][prepared.domains[domain]]
            assert len(expected) == counts["tokens"] == len(got) + counts["unused_tokens"]
            if split == "train":
                assert (
                    np.bincount(expected, minlength=400).tolist()
                    == prepared.token_counts[domain].tolist()
                )


def test_what_is_measured(prepared: Prepared) -> None:
    assert (
        prepared.domains == ("en", "zh")
        and prepared.token_counts.shape == (2, 400)
        and prepared.token_counts.dtype == np.int64
    )
    assert set(prepared.bigram_bits_per_byte) == {"en", "zh", "all"}
    assert 1 < prepared.bigram_bits_per_byte["all"] < 8
    assert "bigram" in prepared.summary() and json.dumps(prepared.report.to_dict())
    assert prepared.sequences("train", 0, []).shape == (0, 33)


def test_the_tokenizer_has_not_seen_held_out_text(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = preparing.Tokenizer.train
    captured: list[str] = []

    def spy(texts: list[str], size: int) -> object:
        captured.extend(texts)
        return train(captured, size)

    monkeypatch.setattr(preparing.Tokenizer, "train", spy)
    config = make_config(validation_fraction=0.3)
    prepare(config, progress=False)
    held_out = {
        part
        for _, _, parts in scan(config.data, config.domains).documents("validation")
        for part in parts
    }
    assert held_out and captured and not held_out & set(captured)


def test_it_is_found_again_and_made_anew_when_something_matters(
    make_config: Make, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(make_config(), progress=False)
    monkeypatch.setattr("pangu_locmoe.data.prepared.build", lambda *_: pytest.fail("built again"))
    assert prepare(make_config(mixture={"en": 0.5, "zh": 0.5})).path == first.path
    names = {
        fingerprint(make_config(**change))
        for change in ({}, {"seq_length": 16}, {"vocab_size": 300}, {"max_document_bytes": 99})
    }
    (corpus / "en" / "01.txt").write_text("changed")
    assert len(names | {fingerprint(make_config())}) == 5


def test_a_failure_leaves_nothing(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "_describe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(make_config(), progress=False)
    assert list((tmp_path / "prepared").iterdir()) == []


def test_a_corpus_of_some_size_is_prepared_by_another_process_to_the_same_result(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = prepare(make_config(), progress=False)
    monkeypatch.setattr(preparing, "_SOON_BYTES", 0)
    there = prepare(make_config(prepared_dir=str(tmp_path / "there")), progress=False)
    assert (there.path / "prepared.json").read_text() == (here.path / "prepared.json").read_text()
    assert stream(there, "train", 1) == stream(here, "train", 1)
    only_one = make_config(sources=[(tmp_path / "corpus" / "en" / "00.txt", "en")])
    with pytest.raises(DataError, match=r"^data\.sources: domain en has one document"):
        prepare(only_one, progress=False)


@pytest.mark.parametrize("seconds", [1, 8])
def test_an_interrupt_ends_prepare_soon_and_leaves_nothing(tmp_path: Path, seconds: float) -> None:
    rng = random.Random(0)  # letters without a break: training on it takes a minute
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("".join(rng.choices("abcdefghij", k=1_000_000)))
    (tmp_path / "t.yaml").write_text(
        f"data: {{prepared_dir: prepared, sources: [{{path: '{tmp_path}/*.txt', domain: a}}]}}"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "pangu_locmoe", "prepare", "t.yaml"],
        cwd=tmp_path,
        start_new_session=True,
        # What a shell starts in the background ignores the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    started = time.perf_counter()
    assert process.wait(60) == 130 and time.perf_counter() - started < 2
    assert not (tmp_path / "prepared").exists() or list((tmp_path / "prepared").iterdir()) == []
    with pytest.raises(ProcessLookupError):  # nothing of its group goes on
        while time.perf_counter() - started < 5:
            os.killpg(process.pid, 0)


def test_copies_of_training_text_are_reported(make_config: Make, corpus: Path) -> None:
    for i in range(30):  # long shared passages in documents that are not near-copies
        (corpus / "en" / f"{i:02d}.txt").write_text(
            make_text("en", i, 600) + make_text("en", 99, 100) + make_text("en", 50 + i, 600)
        )
    prepared = prepare(make_config(validation_fraction=0.2), progress=False)
    assert prepared.report.alike == 0
    counts = prepared.counts["validation"]
    copied = prepared.copies["en"]
    clean = prepared.copies["zh"]
    assert copied["searched"] == counts["en"]["tokens"] - counts["en"]["documents"]
    assert 0.05 < copied["copied"] / copied["searched"] < 0.12 and clean["copied"] == 0
    assert (
        f"of {copied['searched']} validation tokens are in runs of 32 and more"
        in prepared.summary()
    )


def test_a_tokenizer_that_changes_the_corpus_is_refused_and_what_is_not_in_force_is_said(
    make_config: Make, prepared: Prepared, tmp_path: Path, corpus: Path
) -> None:
    values = json.loads((prepared.path / "tokenizer.json").read_text())
    values["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "t.json").write_text(json.dumps(values))
    again = prepare(
        make_config(tokenizer=str(tmp_path / "t.json"), validation_fraction=0.2), progress=False
    )
    assert (
        again.counts == prepared.counts and "tokenizer: not in force: truncation" in again.summary()
    )
    values["normalizer"] = {"type": "Replace", "pattern": {"String": "router"}, "content": "switch"}
    (tmp_path / "t.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"t.json: text is changed by normalizer Replace"):
        prepare(make_config(tokenizer=str(tmp_path / "t.json")), progress=False)


def test_a_half_deleted_folder_is_made_again(make_config: Make) -> None:
    first = prepare(make_config(), progress=False)
    (first.path / "prepared.json").unlink()
    assert prepare(make_config(), progress=False).num_sequences == first.num_sequences
    (first.path / "prepared.json").write_text("{}")
    with pytest.raises(DataError, match="delete it"):
        prepare(make_config(), progress=False)


def test_too_little_text_is_named(make_config: Make, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    config = make_config(sources=[(corpus / "en", "en"), (tmp_path / "few.jsonl", "zh")])
    with pytest.raises(DataError, match=r"domain zh has \d+ bytes .* about \d+ are needed"):
        prepare(config, progress=False)


def test_a_short_validation_side_is_padded(make_config: Make, corpus: Path) -> None:
    prepared = prepare(
        make_config(
            sources=[(corpus / "en", "en")], max_bytes_per_domain=2000, validation_fraction=0.01
        ),
        progress=False,
    )
    assert prepared.num_sequences["validation"] == [1]
    row = prepared.sequences("validation", 0, [0])[0]
    assert row[0] == row[-1] == 0
    tokens = prepared.counts["validation"]["en"]["tokens"] - 1
    assert 0 < tokens < 32
    assert prepared.target_documents(0, [0]).tolist() == [[0] * tokens + [-1] * (32 - tokens)]


def test_a_given_tokenizer_is_used_and_checked(make_config: Make, prepared: Prepared) -> None:
    path = str(prepared.path / "tokenizer.json")
    again = prepare(make_config(tokenizer=path), progress=False)
    assert again.tokenizer.encode("router 专家") == prepared.tokenizer.encode("router 专家")
    with pytest.raises(DataError, match=r"model.vocab_size is only 300"):
        prepare(make_config(tokenizer=path, vocab_size=300), progress=False)
    with pytest.raises(DataError, match=r"data.tokenizer: none.json"):
        prepare(make_config(tokenizer="none.json"), progress=False)


def make_loader(prepared: Prepared, read_ahead: int = 7) -> BatchLoader:
    return BatchLoader(
        prepared,
        BatchSampler(prepared.num_sequences["train"], 4, seed=2),
        reset=True,
        read_ahead=read_ahead,
    )


def test_batches_are_the_picked_sequences(prepared: Prepared) -> None:
    loader = make_loader(prepared)
    sampler = BatchSampler(prepared.num_sequences["train"], 4, seed=2)
    for _ in range(10):
        batch = next(loader)
        picks = next(sampler)
        for row, (domain, number) in enumerate(picks):
            sequence = prepared.sequences("train", domain, [number])[0]
            assert (batch.tokens_BS[row] == sequence[:-1]).all() and (
                batch.targets_BS[row] == sequence[1:]
            ).all()
            assert batch.domains_B[row] == domain
        assert (
            batch.valid_B.all()
            and batch.tokens_BS.dtype == batch.targets_BS.dtype == batch.domains_B.dtype == np.int32
        )


@pytest.mark.parametrize("stop", [0, 1, 7, 10])
def test_resuming_neither_skips_nor_repeats(prepared: Prepared, stop: int) -> None:
    loader = make_loader(prepared)
    again = make_loader(prepared, read_ahead=3)
    for _ in range(stop):
        next(loader)
    next(again)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for _ in range(8):
        expected = next(loader)
        got = next(again)
        assert (expected.tokens_BS == got.tokens_BS).all() and (
            expected.domains_B == got.domains_B
        ).all()


def test_validation_batches(prepared: Prepared) -> None:
    for domain in (0, 1):
        mine = [batch for d, batch in validation_batches(prepared, 7, 4, reset=True) if d == domain]
        assert [batch.valid_B.sum() for batch in mine] == [4, 3]
        assert all(
            batch.tokens_BS.shape == (4, 32) and (batch.domains_B == domain).all() for batch in mine
        )
        rows = np.concatenate([batch.tokens_BS[batch.valid_B] for batch in mine])
        chosen = spread(7, prepared.num_sequences["validation"][domain])
        assert (rows == prepared.sequences("validation", domain, chosen)[:, :-1]).all()
        assert all(
            (batch.documents_BS >= 0).all(axis=1).tolist() == batch.valid_B.tolist()
            for batch in mine
        )


@given(count=st.integers(1, 60), available=st.integers(1, 60))
def test_a_sample_is_spread_over_the_whole_side(count: int, available: int) -> None:
    """As evenly as whole numbers allow; all of them where there are no more."""
    chosen = spread(count, available)
    size = min(count, available)
    assert len({*chosen}) == size and 0 <= chosen[0] <= chosen[-1] < available
    assert all(
        -1 < number - (position + 0.5) * available / size <= 0
        for position, number in enumerate(chosen)
    )


def test_the_document_of_each_target(prepared: Prepared, make_config: Make) -> None:
    """Documents cut into pieces stay one document, and the `<eod>` after a document is that
    document's.
    """
    config = make_config(validation_fraction=0.2, max_document_bytes=100)
    prepared = prepare(config, progress=False)
    for domain in (0, 1):
        documents = [
            parts
            for d, s, parts in scan(config.data, config.domains).documents("validation")
            if d == domain
        ]
        assert max(map(len, documents)) > 1
        owners = [
            n
            for n, parts in enumerate(documents)
            for part in parts
            for _ in [0, *prepared.tokenizer.encode(part)]
        ]
        starts = [
            position
            for position in range(len(owners))
            if position == 0 or owners[position] != owners[position - 1]
        ]
        for position in starts[1:]:
            owners[position] -= 1
        numbers = range(prepared.num_sequences["validation"][domain])
        got = prepared.target_documents(domain, numbers).reshape(-1).tolist()
        assert got == owners[1 : len(got) + 1]


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=20), seq_length=st.integers(1, 50))
def test_training_sequences_hold_no_padding(lengths: list[int], seq_length: int) -> None:
    """Only whole sequences are cut, so that every target is a token of the stream: S for each
    sequence, and what is left over.
    """
    packer = Packer(seq_length, 0)
    sequences = packer.add([np.full(length, 7) for length in lengths])
    stream = [token for length in lengths for token in [0, *[7] * length]]
    assert sequences[:, 1:].reshape(-1).tolist() == stream[1 : 1 + sequences[:, 1:].size]
    assert (
        packer.sequences * seq_length + packer.unused_tokens + bool(packer.sequences)
        == packer.tokens
        == len(stream)
    )


def test_training_sides_are_not_padded(prepared: Prepared) -> None:
    for name in prepared.domains:
        counts = prepared.counts["train"][name]
        assert (
            counts["sequences"] * prepared.seq_length + 1 + counts["unused_tokens"]
            == counts["tokens"]
        )


def test_the_same_text_is_the_same_data_wherever_it_lies(
    make_config: Make, corpus: Path, tmp_path: Path
) -> None:
    first = prepare(make_config(), progress=False)
    shutil.copytree(corpus, tmp_path / "elsewhere" / "corpus")
    again = make_config(
        sources=[(tmp_path / "elsewhere" / "corpus" / name, name) for name in ("en", "zh")]
    )
    data = again.data.model_copy(update={"prepared_dir": str(tmp_path / "elsewhere" / "prepared")})
    second = prepare(again.model_copy(update={"data": data}), progress=False)
    assert second.path.name != first.path.name and second.identity == first.identity
    assert differences(first.identity, second.identity) == []


def test_what_is_not_the_same_data_is_named(
    make_config: Make, corpus: Path, tmp_path: Path
) -> None:
    tokenizer = str(tmp_path / "tokenizer.json")
    shutil.copy(prepare(make_config(), progress=False).path / "tokenizer.json", tokenizer)

    def changes(**settings: Any) -> list[str]:
        return differences(
            before,
            prepare(make_config(**{"tokenizer": tokenizer, **settings}), progress=False).identity,
        )

    before = prepare(make_config(tokenizer=tokenizer), progress=False).identity
    assert changes(seq_length=16) == ["model.seq_length (32 and 16)"]
    assert changes(tokenizer=None) == []
    assert changes(tokenizer=None, vocab_size=300) == ["the tokenizer"]
    assert set(changes(max_document_bytes=99)) <= {
        f"the {side} text of {name}" for side in ("training", "validation") for name in ("en", "zh")
    }
    assert "the training text of en" in changes(max_document_bytes=99)
    assert changes(sources=[(corpus / "zh", "zh"), (corpus / "en", "en")]) == [
        "the domains (en, zh and zh, en)"
    ]
    for file in (corpus / "zh").iterdir():  # every text as long as before
        file.write_text(file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    assert changes() == ["the training text of zh", "the validation text of zh"]


def test_a_side_without_any_text_is_refused(make_config: Make, corpus: Path) -> None:
    config = make_config(
        sources=[(corpus / "en", "en")], max_bytes_per_domain=4000, validation_fraction=0.0001
    )
    with pytest.raises(
        DataError,
        match=r"^data\.validation_fraction = 0\.0001: leaves domain en no byte .*max_bytes_per_domain = 4000 [^\n]*$",
    ):
        prepare(config, progress=False)


def lines(path: Path, count: int, words: int = 40) -> Path:
    """JSON lines of some size: distinct, with a copy, a near-copy and a bad line among them."""
    texts = [make_text("en" if i % 3 else "zh", i, words) for i in range(count)]
    texts += [texts[5], texts[6] + " more"]
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts) + "{]\n", encoding="utf-8"
    )
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_is_prepared_does_not_depend_on_the_number_of_processes(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is the same, byte by byte."""
    monkeypatch.setattr(preparing, "_SOON_BYTES", 10_000)
    monkeypatch.setattr("pangu_locmoe.data.sides._CHUNK_BYTES", 5_000)
    monkeypatch.setattr("pangu_locmoe.data.corpus._CHUNK_DOCUMENTS", 7)
    source = [(lines(tmp_path / "a.jsonl", 120), "en"), (tmp_path / "corpus" / "zh", "zh")]
    found = []
    for workers in (1, 3):
        config = make_config(
            sources=source, workers=workers, prepared_dir=str(tmp_path / f"by-{workers}")
        )
        # In this process, where the sizes of above are known.
        monkeypatch.setattr(preparing, "_fill_apart", preparing._fill)
        found.append(prepare(config, progress=False).path)
    assert found[0].name == found[1].name
    assert contents(found[0]) == contents(found[1])
    report = json.loads((found[0] / "prepared.json").read_text())["report"]
    assert list(report["problems"].items()) == [("duplicate", 1), ("bad_line", 1)]


def test_a_preparation_that_was_killed_goes_on(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "_fill_apart", preparing._fill)
    monkeypatch.setattr(preparing, "_SOON_BYTES", 10_000)
    monkeypatch.setattr("pangu_locmoe.data.sides._CHUNK_BYTES", 5_000)
    source = [(lines(tmp_path / "a.jsonl", 120), "en"), (tmp_path / "corpus" / "zh", "zh")]
    settings: Any = {"sources": source, "workers": 1}
    whole = prepare(make_config(**settings, prepared_dir=str(tmp_path / "whole")), False).path

    monkeypatch.setattr(preparing, "_RESUMED_BYTES", 0)
    tokenize = preparing.tokenize
    done = []

    def tokenize_some(*arguments: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments)
        return tokenize(*arguments)

    tokenize_some.__name__ = tokenize.__name__
    monkeypatch.setattr(preparing, "tokenize", tokenize_some)
    config = make_config(**settings, prepared_dir=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        prepare(config, False)
    (kept,) = (tmp_path / "again").iterdir()
    assert kept.name == f".{whole.name}.parts" and len(list(kept.iterdir())) >= 4

    again = []

    def tokenize_counted(*arguments: Any) -> Any:
        again.append(arguments)
        return tokenize(*arguments)

    tokenize_counted.__name__ = tokenize.__name__
    monkeypatch.setattr(preparing, "tokenize", tokenize_counted)
    path = prepare(config, False).path
    assert contents(path) == contents(whole)
    assert [str(one[2]) for one in again][:1] != [str(one[2]) for one in done][:1]
    assert not {str(one[2]) for one in again} & {str(one[2]) for one in done}
    assert list((tmp_path / "again").iterdir()) == [path]
    assert fingerprint(config) == fingerprint(make_config(**{**settings, "workers": 7}))
