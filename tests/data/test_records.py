from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from pangu_locmoe.data.bigram import bits_per_byte, count_bigrams
from pangu_locmoe.data.records import RecordWriter, read_sequences
from pangu_locmoe.errors import DataError


def test_any_order_across_files_after_a_move(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    writer = RecordWriter(tmp_path / "a", "train-0", 0, rows_per_file=1300)
    rows = np.arange(3000 * 9, dtype=np.int32).reshape(3000, 9)
    for start in range(0, 3000, 700):
        writer.write(rows[start : start + 700])
    names = [path.name for path in writer.close()]
    assert names == [
        "train-0-00000.mindrecord",
        "train-0-00001.mindrecord",
        "train-0-00002.mindrecord",
    ]
    (tmp_path / "a").rename(tmp_path / "b")
    files = [tmp_path / "b" / name for name in names]
    wanted = [*random.Random(1).sample(range(3000), 500), 5, 5, 2999]
    got = np.stack(list(read_sequences(files, wanted)))
    assert got.dtype == np.int32 and (got == rows[wanted]).all()
    assert (np.stack(list(read_sequences(files, [2, 2, 2]))) == rows[2]).all()
    assert list(read_sequences(files, [])) == []


def test_missing_or_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        list(read_sequences([tmp_path / "none.mindrecord"], [0]))
    writer = RecordWriter(tmp_path, "x", 0)
    writer.write(np.zeros((3, 5), np.int32))
    (file,) = writer.close()
    with pytest.raises(DataError, match="damaged"):
        list(read_sequences([file], [7]))
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="damaged"):
        list(read_sequences([file], [0]))


def test_no_rows_no_files(tmp_path: Path) -> None:
    assert RecordWriter(tmp_path, "x", 0).close() == []


def test_bigrams_count_by_hand() -> None:
    counts = count_bigrams([b"aba", b"", b"b", b""])
    assert counts.sum() == 4
    assert (
        counts[256, ord("a")]
        == counts[256, ord("b")]
        == counts[ord("a"), ord("b")]
        == counts[ord("b"), ord("a")]
        == 1
    )
    assert count_bigrams([]).shape == (257, 256)


def test_bigram_bits_against_a_loop() -> None:
    training = [b"hello world", b"hell"]
    text = [b"help", b"ow"]
    pairs = [pair for document in training for pair in zip([256, *document], document)]
    expected = 0.0
    for document in text:
        for before, byte in zip([256, *document], document):
            expected -= np.log2(
                (pairs.count((before, byte)) + 1) / (sum(b == before for b, _ in pairs) + 256)
            )
    assert bits_per_byte(count_bigrams(training), count_bigrams(text)) == pytest.approx(
        expected / 6
    )
    assert np.isnan(bits_per_byte(count_bigrams(training), count_bigrams([])))
