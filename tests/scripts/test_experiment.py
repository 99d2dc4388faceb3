"""Measuring goes on where it stopped, and the page says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study import page as pages
from study import reproduce, verdict
from study.experiment import Claim, Experiment, read_measured, record, still_to_measure
from study.recorded import Recorded


def experiment(factors=(1, 2, 3), **settings):
    def claims(measured):
        values = [float(row["result"]) for row in measured]
        return [
            Claim(
                "It grows",
                "yes",
                verdict.spread(values, ".0f"),
                "",
                "here",
                *verdict.positive(values, "it is above 0"),
            )
        ]

    return Experiment(
        "growth",
        lambda quick: [{"factor": factor, "quick": quick, **settings} for factor in factors],
        lambda case: 10 * case["factor"],
        claims,
    )


@pytest.fixture
def calls(monkeypatch):
    """Cases measured, in this process."""
    made = []
    monkeypatch.setattr(
        reproduce,
        "_in_a_process",
        lambda name, case: made.append(case["factor"]) or 10 * case["factor"],
    )
    return made


def test_what_is_measured_is_not_measured_again(tmp_path, calls):
    file = tmp_path / "growth.json"
    reproduce._measure(experiment((1, 2)), file, False, False)
    reproduce._measure(experiment((3, 1, 2)), file, False, False)
    assert calls == [1, 2, 3]
    assert [row["case"]["factor"] for row in read_measured(file)] == [3, 1, 2]
    reproduce._measure(experiment((3, 1, 2)), file, True, False)
    assert calls == [1, 2, 3, 3, 1, 2]


def test_changed_settings_are_measured_and_the_old_ones_forgotten(tmp_path, calls):
    file = tmp_path / "growth.json"
    reproduce._measure(experiment(steps=10), file, False, False)
    longer = experiment(steps=20)
    assert still_to_measure(longer, file, False) == longer.cases(False)
    reproduce._measure(longer, file, False, False)
    assert len(calls) == 6 and {row["case"]["steps"] for row in read_measured(file)} == {20}


def test_a_stop_between_two_cases_loses_nothing(tmp_path, monkeypatch):
    file = tmp_path / "growth.json"

    def second_fails(name, case):
        if case["factor"] == 2:
            raise KeyboardInterrupt
        return 1

    monkeypatch.setattr(reproduce, "_in_a_process", second_fails)
    with pytest.raises(KeyboardInterrupt):
        reproduce._measure(experiment(), file, False, False)
    assert [case["factor"] for case in still_to_measure(experiment(), file, False)] == [2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["growth.json"]


def test_the_page_has_verdicts_rules_and_what_is_missing(tmp_path, monkeypatch):
    half = experiment()
    none = Experiment("nothing", lambda quick: [{}], lambda case: 0, lambda measured: [])
    absent = Recorded("absent", ("true",), ("absent.json",), lambda folder: [], "")
    monkeypatch.setattr(pages, "ALL", [half, none, absent])
    record(half, tmp_path / "growth.json", True, half.cases(True)[0], 10, 1.0)
    pages.write_page(tmp_path / "results.md", tmp_path, tmp_path, True)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| It grows | yes | 10 |" in text and "| holds | 1 |" in text
    assert "1. holds if it is above 0 in every case" in text
    assert "1 hold, 0 hold partly" in text and "**Quick settings**" in text
    assert "`growth` lacks 2 of its 3 cases" in text
    assert "`nothing` has not been run." in text and "`absent` has not been run." in text


def test_the_committed_numbers_make_rows(tmp_path):
    """What is in docs/results is read as it is there."""
    for one in pages.ALL:
        if isinstance(one, Recorded):
            claims = one.claims(reproduce.COMMITTED)
            assert claims and all(
                claim.verdict in (verdict.HOLDS, verdict.PARTLY, verdict.NOT, verdict.CANNOT)
                for claim in claims
            )


def test_cases_are_json_and_all_different():
    for one in pages.ALL:
        if isinstance(one, Experiment):
            for quick in (True, False):
                cases = one.cases(quick)
                assert cases and json.loads(json.dumps(cases)) == cases
                assert len({json.dumps(case) for case in cases}) == len(cases)


def test_the_script_knows_every_name():
    text = (Path(__file__).parents[2] / "scripts" / "reproduce.sh").read_text(encoding="utf-8")
    assert "experiments='" + "|".join(one.name for one in pages.ALL) + "'" in text
