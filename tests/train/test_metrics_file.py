"""metrics.jsonl: rows by the standard of JSON, and what is in it that is not ours."""

from __future__ import annotations

import json
import math

import pytest

from pangu_locmoe.train.metrics import MetricsFile


def test_a_row_has_null_for_what_is_no_number(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "grad_norm": math.nan, "by": {"a": math.inf}})
    file.close()
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "grad_norm": null, "by": {"a": null}}\n'


FOREIGN = ['{"note": 1}', '{"step": null}', '{"step": "5"}', "[]", "[9]", "9", "null", '"text"']


@pytest.mark.parametrize(
    "last",
    ['{"step": 2, "lo', '{"step": 2}', "\xff\xfe", "[" * 100_000],
    ids=["cut", "no newline", "not UTF-8", "deep"],
)
def test_lines_of_others_stay_and_later_rows_go(tmp_path, last):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        "\n".join(['{"step": 1}', *FOREIGN, '{"step": 3}', "", last]).encode("latin-1")
    )
    file = MetricsFile(path, 2)
    file.write({"step": 3})
    file.close()
    lines = path.read_text().splitlines()
    own = ['{"step": 2}'] if last == '{"step": 2}' else []
    assert lines == ['{"step": 1}', *FOREIGN, *own, '{"step": 3}']
    assert [json.loads(line) for line in lines]
