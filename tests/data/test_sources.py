"""Parquet, Megatron's token ids, and columns of other names among the sources."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import pytest
from support.texts import make_text

from pangu_locmoe.config import Config
from pangu_locmoe.data.corpus import Corpus, scan
from pangu_locmoe.data.prepared import Prepared, fingerprint, prepare
from pangu_locmoe.data.tokenizer import Tokenizer
from pangu_locmoe.errors import DataError

Make = Callable[..., Config]
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def write_megatron(
    prefix: Path,
    documents: list[list[list[int]]],
    code: int = 4,
    version: int = 1,
    modes: bool = False,
) -> None:
    """By the format's definition; a document is a list of sequences."""
    kind = np.dtype(TYPES.get(code, "<i4"))
    sequences = [np.array(ids, kind) for sequences in documents for ids in sequences]
    lengths = [len(ids) for ids in sequences]
    places = np.cumsum([0, *lengths])[:-1] * kind.itemsize
    bounds = np.cumsum([0, *map(len, documents)])
    Path(f"{prefix}.bin").write_bytes(b"".join(ids.tobytes() for ids in sequences))
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", version, code, len(sequences), len(bounds))
        + np.array(lengths, "<i4").tobytes()
        + np.array(places, "<i8").tobytes()
        + bounds.astype("<i8").tobytes()
        + (np.zeros(len(sequences), "i1").tobytes() if modes else b"")
    )


@pytest.fixture
def tokenizer_file(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def texts(count: int = 12) -> list[str]:
    return [make_text("en", number) for number in range(count)]


def use(
    make_config: Make, path: Any, source: Optional[dict[str, str]] = None, **data: Any
) -> Config:
    config = make_config(sources=[(path, "en")], validation_fraction=0.3, **data)
    changed = [one.model_copy(update=source or {}) for one in config.data.sources]
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": changed})})


def stream(prepared: Prepared, split: str, domain: int = 0) -> list[int]:
    rows = prepared.sequences(split, domain, range(prepared.num_sequences[split][domain]))
    return [*rows[0, :1].tolist(), *rows[:, 1:].reshape(-1).tolist()]


@pytest.mark.parametrize(
    "name, code", [("{}", 3), ("{}", 5), ("{}.bin", 4), ("{}.idx", 8), ("folder", 4)]
)
def test_megatron_is_the_text_that_it_was_made_of(
    make_config: Make,
    tmp_path: Path,
    tokenizer: Tokenizer,
    tokenizer_file: Path,
    code: int,
    name: str,
) -> None:
    (tmp_path / "m").mkdir()
    prefix = tmp_path / "m" / "my.data_text_document"
    ids = [tokenizer.encode(text) for text in texts()]
    documents = [[[*one, tokenizer.end_of_document]] for one in ids]
    documents[3] = [ids[3][:40], ids[3][40:]]  # several sequences, and no <eod> at the end
    write_megatron(prefix, documents, code, modes=code == 8)
    path = prefix.parent if name == "folder" else name.format(prefix)
    got = prepare(use(make_config, path, tokenizer=str(tokenizer_file)), progress=False)
    (tmp_path / "same.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in texts()))
    expected = prepare(
        use(make_config, tmp_path / "same.jsonl", tokenizer=str(tokenizer_file)), progress=False
    )
    assert got.counts == expected.counts and got.report.files == 1
    assert got.bigram_bits_per_byte == expected.bigram_bits_per_byte
    assert got.copies == expected.copies
    np.testing.assert_array_equal(got.token_counts, expected.token_counts)
    for split in ("train", "validation"):
        assert stream(got, split) == stream(expected, split)


def test_megatron_ids_are_used_as_they_are(
    make_config: Make, tmp_path: Path, tokenizer: Tokenizer, tokenizer_file: Path
) -> None:
    """Not what the tokenizer would make of their text: here a token for each byte, some no UTF-8; an
    `<eod>` inside parts documents; long ones are cut within the limit.
    """
    byte = {tokenizer.bytes_of(i): i for i in range(tokenizer.vocab_size) if tokenizer.bytes_of(i)}
    ids = [[byte[bytes([value])] for value in text.encode()] for text in texts(8)]
    ids[2][5] = byte[b"\xff"]
    documents = [[one] for one in ids[:6]] + [[[*ids[6], tokenizer.end_of_document, *ids[7]]]]
    write_megatron(tmp_path / "m", documents, 8)
    config = use(make_config, tmp_path / "m", tokenizer=str(tokenizer_file), max_document_bytes=100)
    corpus = scan(config.data, config.domains, tokenizer)
    pieces = [parts for _, _, parts in corpus.documents()]
    assert [np.concatenate(parts).tolist() for parts in pieces] == ids
    assert all(len(part) <= 100 for parts in pieces for part in parts)
    assert all(len(part) == 100 for parts in pieces for part in parts[:-1])
    prepared = prepare(config, progress=False)
    counts = prepared.counts
    assert sum(counts[split]["en"]["bytes"] for split in counts) == sum(map(len, ids))


@pytest.mark.parametrize("wrong", [400, 65_000, -1])
def test_ids_that_are_not_of_the_tokenizer_are_refused(
    make_config: Make, tmp_path: Path, tokenizer: Tokenizer, tokenizer_file: Path, wrong: int
) -> None:
    documents = [[tokenizer.encode(text)] for text in texts(3)]
    documents[1][0][7] = wrong
    write_megatron(tmp_path / "m", documents)
    config = use(make_config, tmp_path / "m", tokenizer=str(tokenizer_file))
    with pytest.raises(
        DataError,
        match=rf"^data\.sources: \S+m\.idx:2: token id {wrong} is none of data\.tokenizer, which has 400 tokens; [^\n]+$",
    ):
        prepare(config, progress=False)


def test_token_ids_need_a_tokenizer(make_config: Make, tmp_path: Path) -> None:
    write_megatron(tmp_path / "m", [[[1, 2]], [[3, 4]]])
    with pytest.raises(
        DataError, match=r"^data\.sources: \S+m\.idx: token ids need data\.tokenizer"
    ):
        prepare(use(make_config, tmp_path / "m"), progress=False)


@pytest.mark.parametrize("damage", ["no bin", "short bin", "cut", "version", "floats", "bounds"])
def test_a_damaged_index_is_counted(
    make_config: Make, tmp_path: Path, tokenizer: Tokenizer, tokenizer_file: Path, damage: str
) -> None:
    (tmp_path / "m").mkdir()
    good = [[tokenizer.encode(text)] for text in texts(3)]
    write_megatron(tmp_path / "m" / "good", good)
    bad = tmp_path / "m" / "bad"
    write_megatron(
        bad,
        good,
        code=7 if damage == "floats" else 4,
        version=2 if damage == "version" else 1,
    )
    index = bad.with_suffix(".idx")
    if damage == "no bin":
        bad.with_suffix(".bin").unlink()
    elif damage == "short bin":
        bad.with_suffix(".bin").write_bytes(bad.with_suffix(".bin").read_bytes()[:-1])
    elif damage == "cut":
        index.write_bytes(index.read_bytes()[:-9])
    elif damage == "bounds":
        index.write_bytes(index.read_bytes()[:-8] + struct.pack("<q", 99))
    config = use(make_config, tmp_path / "m", tokenizer=str(tokenizer_file))
    corpus = scan(config.data, config.domains, tokenizer)
    assert corpus.report.problems == {"unreadable": 1}
    assert len(list(corpus.documents())) == 3


def test_other_bins_are_files_like_others(make_config: Make, corpus: Path) -> None:
    (corpus / "en" / "x.bin").write_bytes(b"\xff\xfe")
    (corpus / "en" / "y.idx").write_text(make_text("en", 99))
    config = make_config()
    assert scan(config.data, config.domains).report.problems == {"undecodable": 1}


def parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path, row_group_size=5)
    return path


def documents_of(corpus: Corpus) -> dict[str, str]:
    return {
        "".join(str(part) for part in parts): corpus.domains[domain]
        for domain, _, parts in corpus.documents()
    }


def test_parquet_rows_are_documents(make_config: Make, tmp_path: Path, corpus: Path) -> None:
    rows = [*texts(10), None, " ", "x" * 64_001, "last"]
    path = parquet(
        tmp_path / "a.PARQUET",
        body=rows,
        lang=["zh", "xx", *[None] * 12],
        other=[{"a": 1}] * 14,
    )
    config = use(
        make_config,
        path,
        {"text_column": "body", "domain_column": "lang"},
        max_document_bytes=640,
    )
    zh = make_config(sources=[(corpus / "zh", "zh")]).data.sources
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"sources": [*config.data.sources, *zh]})}
    )
    found = scan(config.data, config.domains)
    assert found.report.problems == {"bad_line": 2, "empty": 1, "huge": 1}
    assert found.report.examples["bad_line"] == [f"{path}:2", f"{path}:11"]
    got = documents_of(found)
    assert got[rows[0]] == "zh" and got[rows[2]] == got["last"] == "en"
    assert len(got) == 10 + 30
    assert prepare(config, progress=False).report.problems == found.report.problems


def test_a_parquet_file_without_the_column_is_refused(make_config: Make, tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", body=["a"], title=["b"])
    with pytest.raises(DataError, match=r"has no column 'text'; text_column can be body, title$"):
        prepare(use(make_config, path), progress=False)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"domain en has no documents.*1 unreadable"):
        prepare(use(make_config, path), progress=False)


def test_parquet_without_its_package_is_one_line(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError,
        match=r"a\.parquet: Parquet needs the package pyarrow: pip install 'pangu_locmoe\[parquet\]'$",
    ):
        prepare(use(make_config, tmp_path / "a.parquet"), progress=False)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson.gz"])
def test_json_lines_have_columns_of_any_name(
    make_config: Make, tmp_path: Path, suffix: str
) -> None:
    lines = [json.dumps({"content": text, "text": 3, "domain": "no"}) for text in texts(6)]
    content = "\n".join([*lines, json.dumps({"text": "x"})]).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    columns = {"text_column": "content", "domain_column": "lang"}
    config = use(make_config, path, columns)
    found = scan(config.data, config.domains)
    assert set(documents_of(found)) == set(texts(6))
    assert found.report.problems == {"bad_line": 1}
    assert fingerprint(config) != fingerprint(use(make_config, path))


def test_columns_of_files_that_have_none_are_refused(make_config: Make, corpus: Path) -> None:
    with pytest.raises(DataError, match=r"text_column and domain_column are of JSON lines and"):
        prepare(use(make_config, corpus / "en", {"text_column": "body"}), progress=False)
