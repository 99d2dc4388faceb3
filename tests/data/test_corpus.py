from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import make_text

from pangu_locmoe.config import Config
from pangu_locmoe.data import documents
from pangu_locmoe.data.corpus import Corpus, scan
from pangu_locmoe.data.documents import CorpusReport, pieces
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.errors import DataError

Make = Callable[..., Config]


def scanned(config: Config) -> Corpus:
    return scan(config.data, config.domains)


def sides(corpus: Corpus) -> dict[str, set[str]]:
    return {
        split: {"".join(parts) for _, _, parts in corpus.documents(split)}
        for split in ("train", "validation")
    }


def test_split_is_by_document_without_leaks_and_repeatable(make_config: Make) -> None:
    first = scanned(make_config(validation_fraction=0.2))
    split = sides(first)
    assert (
        not split["train"] & split["validation"] and len(split["train"] | split["validation"]) == 60
    )
    assert {d for d, s, _ in first.documents() if s == "validation"} == {0, 1}
    assert list(first.documents()) == list(
        scanned(make_config(validation_fraction=0.2)).documents()
    )


def test_split_is_stable_when_documents_come(make_config: Make, corpus: Path) -> None:
    before = sides(scanned(make_config(validation_fraction=0.2)))
    (corpus / "en" / "00a.txt").write_text(make_text("en", 77))
    after = sides(scanned(make_config(validation_fraction=0.2)))
    assert before["train"] <= after["train"] and before["validation"] <= after["validation"]


def test_each_side_has_a_document_whatever_the_fraction(make_config: Make) -> None:
    for fraction in (1e-9, 1 - 1e-9):
        corpus = scanned(make_config(validation_fraction=fraction))
        for split in ("train", "validation"):
            assert {domain for domain, _, _ in corpus.documents(split)} == {0, 1}


def test_pieces_of_a_document_are_on_one_side(make_config: Make, tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "".join(f"document {i} line {j}\n" for j in range(50))})
        for i in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = scanned(
        make_config(
            sources=[(tmp_path / "a.jsonl", "en")], max_document_bytes=100, validation_fraction=0.3
        )
    )
    owners = {
        split: {part.split()[1] for _, _, parts in corpus.documents(split) for part in parts}
        for split in ("train", "validation")
    }
    assert corpus.report.cut == 20 and not owners["train"] & owners["validation"]
    assert all(len(part.encode()) <= 100 for _, _, parts in corpus.documents() for part in parts)


@given(text=st.text(alphabet=st.sampled_from("ab\n中😀")), size=st.integers(4, 20))
def test_pieces_are_whole_characters(text: str, size: int) -> None:
    parts = list(pieces(text, size))
    assert "".join(parts) == text and all(len(part.encode()) <= size for part in parts)


def test_bad_files_are_counted(make_config: Make, corpus: Path) -> None:
    folder = corpus / "en"
    (folder / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "zeros.bin").write_bytes(b"\0\0")
    (folder / "empty.txt").write_text(" \n")
    (folder / "copy.txt").write_text((folder / "05.txt").read_text())
    (folder / "broken.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    (folder / "huge.txt").write_text("x" * 640_001)
    (folder / ".hidden").write_text("hidden")
    corpus_read = scanned(make_config(max_document_bytes=6400))
    assert dict(corpus_read.report.problems) == {
        "hidden": 1,
        "undecodable": 3,
        "empty": 1,
        "duplicate": 1,
        "unreadable": 1,
        "huge": 1,
    }
    assert len(list(corpus_read.documents())) == 60
    assert (
        CorpusReport.from_dict(json.loads(json.dumps(corpus_read.report.to_dict())))
        == corpus_read.report
    )
    assert "3 files that are not UTF-8 text, e.g." in corpus_read.report.summary()


def test_duplicates_across_domains_cannot_leak(make_config: Make, corpus: Path) -> None:
    for i in range(30):
        (corpus / "zh" / f"copy{i}.txt").write_text((corpus / "en" / f"{i:02d}.txt").read_text())
    found = scanned(make_config(validation_fraction=0.5))
    texts = ["".join(parts) for _, _, parts in found.documents()]
    assert found.report.problems["duplicate"] == 30 and len(texts) == len(set(texts)) == 60


def test_json_lines_gz_and_domains(make_config: Make, tmp_path: Path) -> None:
    lines: list[Any] = [{"text": f"text {i}", "domain": "zh" if i % 2 else None} for i in range(8)]
    lines += [
        {"text": "x", "domain": "unknown"},
        {"text": "x", "domain": ["zh"]},
        {"text": 3},
        {"no": 1},
        [1],
        {"text": "\ud800"},
        {"text": ""},
    ]
    content = "\n".join(json.dumps(line) for line in lines) + '\nno json\n\n{"text": "last"}'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.encode() + b'\n{"text": "\xff"}\n'))
    corpus = scanned(
        make_config(sources=[(tmp_path / "a.jsonl.gz", "en"), (tmp_path / "corpus" / "zh", "zh")])
    )
    got = {"".join(parts): domain for domain, _, parts in corpus.documents()}
    assert got["text 0"] == 0 and got["text 1"] == 1 and got["last"] == 0
    assert dict(corpus.report.problems) == {"bad_line": 8, "empty": 1}


def test_a_huge_json_line_is_skipped_and_the_next_read(make_config: Make, tmp_path: Path) -> None:
    good = [json.dumps({"text": f"good {i}"}) for i in range(3)]
    (tmp_path / "a.jsonl").write_text(
        "\n".join([good[0], json.dumps({"text": "x" * 30_000}), *good[1:]])
    )
    corpus = scanned(make_config(sources=[(tmp_path / "a.jsonl", "en")], max_document_bytes=64))
    assert dict(corpus.report.problems) == {"huge": 1} and len(list(corpus.documents())) == 3


def test_globs(make_config: Make, corpus: Path) -> None:
    found = scanned(make_config(sources=[(corpus / "*" / "0*.txt", "en")]))
    assert found.report.files == 20


@pytest.mark.parametrize("name", ["missing", "*.none", "folder"])
def test_a_source_without_files_is_named(make_config: Make, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"data.sources: .*" + name.replace("*", r"\*")):
        scanned(make_config(sources=[(tmp_path / name, "en")]))


def test_a_domain_needs_two_documents(make_config: Make, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="domain en has one document"):
        scanned(make_config(sources=[(corpus / "en" / "00.txt", "en")]))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"domain en has no documents.*1 empty"):
        scanned(make_config(sources=[(tmp_path / "empty.txt", "en")]))


def test_no_sources(make_config: Make) -> None:
    with pytest.raises(DataError, match="name at least one"):
        scanned(make_config(sources=[]))


def test_the_limit_takes_from_everywhere_and_holds_on_both_sides(make_config: Make) -> None:
    corpus = scanned(make_config(max_bytes_per_domain=8000, validation_fraction=0.2))
    for domain in (0, 1):
        size = sum(
            len(part.encode())
            for d, _, parts in corpus.documents()
            for part in parts
            if d == domain
        )
        assert 7000 < size <= 8000
    numbers = [int(parts[0].split("\n")[0]) for d, _, parts in corpus.documents() if d == 0]
    assert max(numbers) > 15 and corpus.report.over_limit["en"] > 0
    assert {split: set(counts) for split, counts in corpus.report.documents.items()} == {
        "train": {"en", "zh"},
        "validation": {"en", "zh"},
    }


def test_a_file_that_changes_while_it_is_read(make_config: Make, corpus: Path) -> None:
    found = scanned(make_config())
    (corpus / "en" / "03.txt").write_text("something else")
    with pytest.raises(DataError, match="changed"):
        list(found.documents())


def near_copy(text: str) -> str:
    return text.replace("cluster", "machine", 1) + "\nThe end."


def test_near_copies_are_on_one_side_whatever_the_order_and_the_domain(
    make_config: Make, corpus: Path
) -> None:
    for i in range(30):
        text = make_text("en", i, 600)
        (corpus / "en" / f"{i:02d}.txt").write_text(text)
        (corpus / "zh" / f"copy{i}.txt").write_text(near_copy(text))
    found = scanned(make_config(validation_fraction=0.5))
    split = sides(found)
    assert found.report.alike == 60
    assert all(
        (make_text("en", i, 600) in split["train"])
        == (near_copy(make_text("en", i, 600)) in split["train"])
        for i in range(30)
    )
    swapped = sides(
        scanned(
            make_config(
                validation_fraction=0.5, sources=[(corpus / "zh", "zh"), (corpus / "en", "en")]
            )
        )
    )
    assert swapped == split
    assert 0.2 < found.report.documents["validation"]["en"] / 30 < 0.8
    assert CorpusReport.from_dict(json.loads(json.dumps(found.report.to_dict()))) == found.report


def test_a_domain_of_near_copies_only_still_has_two_sides(
    make_config: Make, tmp_path: Path
) -> None:
    (tmp_path / "alike").mkdir()
    for i in range(5):
        (tmp_path / "alike" / f"{i}.txt").write_text(make_text("en", 1, 600) + str(i))
    found = sides(scanned(make_config(sources=[(tmp_path / "alike", "en")])))
    assert found["train"] and found["validation"] and sum(map(len, found.values())) == 5


def test_what_most_of_a_domain_is_alike_in_is_no_copy(make_config: Make, tmp_path: Path) -> None:
    """Forms that are filled in: one by one on the side of their hashes, but three copies of another."""
    (tmp_path / "forms").mkdir()
    for i in range(40):
        (tmp_path / "forms" / f"{i}.txt").write_text(make_text("en", 1, 600) + str(i))
    for i in range(3):
        (tmp_path / "forms" / f"other{i}.txt").write_text(make_text("en", 2, 600) + str(i))
    config = make_config(validation_fraction=0.5, sources=[(tmp_path / "forms", "en")])
    found = scanned(config)
    assert found.report.alike == 3
    assert 8 < found.report.documents["validation"]["en"] < 35
    split = sides(found)["train"]
    assert len({make_text("en", 2, 600) + str(i) in split for i in range(3)}) == 1


def links(folder: Path, tmp_path: Path) -> None:
    """A folder with a link to another, with links in circles, one to a folder twice, and one
    that leads nowhere.
    """
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    for i in range(3):
        (other / "deep" / f"o{i}.txt").write_text(make_text("en", 100 + i))
    (folder / "link").symlink_to(other)
    (folder / "link2").symlink_to(other)
    (other / "up").symlink_to(folder)
    (other / "self").symlink_to("self")
    (folder / "dangling.txt").symlink_to("/nonexistent")


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt", "*", "../e[n]"])
def test_links_are_followed_once_and_what_is_passed_over_is_counted(
    make_config: Make, corpus: Path, tmp_path: Path, pattern: str
) -> None:
    links(corpus / "en", tmp_path)
    os.mkfifo(corpus / "en" / "pipe.txt")
    (corpus / "en" / ".hidden.txt").write_text("hidden")
    found = scanned(
        make_config(sources=[(f"{corpus / 'en'}/{pattern}" if pattern else corpus / "en", "en")])
    )
    assert found.report.documents["train"]["en"] + found.report.documents["validation"]["en"] == 33
    expected = {"special": 1, "hidden": 1, "dangling": 1 if pattern == "**/*.txt" else 2}
    if pattern == "*":  # the link `up` comes by what the pattern named already
        expected.update(hidden=2, dangling=3)
    assert {key: found.report.problems[key] for key in expected} == expected
    assert set(found.report.problems) <= {*expected, "repeated"}
    assert all(problem in documents.PROBLEMS for problem in found.report.problems)


def test_a_folder_that_cannot_be_read_is_counted(
    make_config: Make, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (corpus / "en" / "closed").mkdir()
    listdir = os.listdir

    def refusing(path: Path) -> list[str]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    for path in (corpus / "en", f"{corpus}/**/*.txt"):
        assert scanned(make_config(sources=[(path, "en")])).report.problems["unreadable"] == 1


def test_globs_find_folders_and_hidden_names_that_they_spell(
    make_config: Make, corpus: Path
) -> None:
    (corpus / ".cache").mkdir()
    (corpus / ".cache" / "x.txt").write_text(make_text("en", 200))
    for pattern, count in (
        ("*", 60),
        ("e*/", 30),
        ("**/en", 30),
        ("*/*[0-4].txt", 30),
        (".c*/x.txt", 1),
        ("./../corpus/z*", 30),
    ):
        assert len(documents.source_files(f"{corpus}/{pattern}", CorpusReport())) == count


def test_a_source_of_which_nothing_can_be_read_says_why(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to("/nonexistent")
    with pytest.raises(
        DataError,
        match=r"gone\.txt: no file that can be read \(left out: 1 links that lead nowhere\)",
    ):
        scanned(make_config(sources=[(tmp_path / "gone.txt", "en")]))


@pytest.mark.parametrize("suffix", [".JSONL", ".ndjson", ".NdJson.GZ", ".jsonl.Gz", ".jsonlines"])
def test_json_lines_by_any_name(make_config: Make, tmp_path: Path, suffix: str) -> None:
    content = "\n".join(json.dumps({"text": f"text {i}"}) for i in range(5)).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.lower().endswith(".gz") else content)
    assert len(list(scanned(make_config(sources=[(path, "en")])).documents())) == 5


@pytest.mark.parametrize(
    "name", [b"caf\xe9.bin", b"line\nend.bin", b"\xff\xfe\x1b[31m.bin", "中文é.bin".encode()]
)
def test_a_file_name_is_any_bytes(make_config: Make, corpus: Path, name: bytes) -> None:
    for content, ending in (
        (b"\xff\xfe", b""),
        (make_text("en", 300).encode(), b".txt"),
        (b'{"no": 1}', b".jsonl"),
    ):
        Path(os.fsdecode(os.fsencode(corpus / "en") + b"/" + name + ending)).write_bytes(content)
    prepared = prepare(make_config(), progress=False)
    assert (
        prepared.report.problems == {"undecodable": 1, "bad_line": 1}
        and prepared.report.files == 63
    )
    for locations in prepared.report.examples.values():
        assert locations[0].isprintable() and locations[0].encode("utf-8")
    assert prepared.summary().encode("utf-8")
