"""Which configurations the example corpus is fetched for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import uses_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "path, code",
    [("data/corpus", 0), ("data/corpus/en", 0), ("data/corpus_of_mine", 1), ("other/corpus", 1)],
)
def test_a_source_in_the_corpus(tmp_path, path, code):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"data": {"sources": [{"path": path, "domain": "en"}]}}))
    assert uses_corpus.main([str(file)]) == code


def test_overrides_count():
    sets = ["--set", "data.sources=[{path: other, domain: en}]", "--set", "data.mixture=null"]
    smoke = str(ROOT / "configs" / "cpu_smoke.yaml")
    assert (uses_corpus.main([smoke]), uses_corpus.main([smoke, *sets])) == (0, 1)


def test_what_cannot_be_read_is_for_train_to_say(tmp_path, capsys):
    assert uses_corpus.main([str(tmp_path / "absent.yaml")]) == 1
    assert uses_corpus.main([str(ROOT / "configs" / "cpu_smoke.yaml"), "--set", "data.no=1"]) == 1
    assert capsys.readouterr() == ("", "")
