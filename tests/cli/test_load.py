"""`pangu-locmoe load`: what a user sees of each verb, on the recorded traces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pangu_locmoe.cli import main
from pangu_locmoe.expert_load.trace import Trace, read_trace, write_trace

TRACE = Path(__file__).resolve().parents[1] / "data" / "traces" / "switch-1.npz"


def run(capsys, *arguments: object) -> str:
    assert main(["load", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: object) -> str:
    """The one line that a wrong call prints."""
    assert main(["load", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    return said.err.removeprefix("pangu-locmoe: ").strip()


def test_import_writes_a_trace(tmp_path, capsys):
    file = tmp_path / "load.csv"
    output = tmp_path / "load.npz"
    file.write_text(
        "step,layer,expert,tokens\n"
        + "".join(
            f"{step},0,{expert},{step + expert}\n" for step in (1, 2, 3) for expert in (0, 1)
        ),
        encoding="utf-8",
    )
    assert (
        run(capsys, "import", file, "--output", output).strip()
        == f"{output}: 3 rows, steps 1 to 3, 1 layers, 2 experts"
    )
    assert read_trace(output).load_WLE[:, 0].tolist() == [[1, 2], [2, 3], [3, 4]]


def test_a_bad_file_leaves_nothing_behind(tmp_path, capsys):
    file = tmp_path / "load.csv"
    file.write_text("step,layer,expert,tokens\n1,0,0,-3\n", encoding="utf-8")
    assert "line 2" in refused(capsys, "import", file, "--output", tmp_path / "load.npz")
    assert list(tmp_path.iterdir()) == [file]


def test_states_as_text_as_json_and_as_a_picture(tmp_path, capsys):
    found = json.loads(run(capsys, "states", TRACE, "--json"))
    assert found["stable_from"] == max(found["layers_stable_from"])
    assert f"stable from step {found['stable_from']} of 2400" in run(
        capsys, "states", TRACE, "--plot", tmp_path / "states.svg"
    )
    assert (tmp_path / "states.svg").read_text(encoding="utf-8").count("<svg") == 1
    assert refused(capsys, "states", TRACE, "--window", 2).startswith("--window 2: ")


def test_forecast_writes_shares_and_prints_errors(tmp_path, capsys):
    output = tmp_path / "f.npz"
    found = json.loads(
        run(
            capsys,
            "forecast",
            TRACE,
            "--origin",
            2001,
            "--horizon",
            300,
            "--method",
            "sw_avg",
            "--option",
            "window=50",
            "--output",
            output,
            "--json",
        )
    )
    with np.load(output) as archive:
        assert archive["step"].tolist() == list(range(2001, 2301))
        assert archive["share"].shape == (300, 4, 16)
        np.testing.assert_allclose(archive["share"].sum(axis=2), 1)
        wape = (
            np.abs(archive["share"] - read_trace(TRACE).between(2001, 2301).share_WLE)
            .sum(axis=2)
            .mean()
        )
    assert found["errors"]["pooled"]["wape"] == pytest.approx(wape)
    assert set(found["errors"]["pooled"]) >= {"mae_points", "wape", "total_variation", "mase"}
    assert len(found["errors"]["layers"]) == 4


def test_beyond_the_trace_there_are_no_errors(capsys):
    assert "the trace does not cover these steps" in run(
        capsys, "forecast", TRACE, "--horizon", 10, "--method", "last"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["forecast", TRACE, "--horizon", 10, "--method", "sw_agv"], "did you mean sw_avg?"),
        (
            ["forecast", TRACE, "--horizon", 10, "--option", "window"],
            "--option window: must be NAME=VALUE",
        ),
        (["forecast", TRACE, "--horizon", 10, "--origin", 1], "needs 2 rows before it"),
        (
            ["forecast", "nowhere.npz", "--horizon", 10],
            "nowhere.npz: not a load trace: it does not exist",
        ),
        (
            ["place", TRACE, "--nodes", 3, "--ranks-per-node", 1, "--output", "plan.json"],
            "must be divisible",
        ),
        (
            [
                "place",
                TRACE,
                "--nodes",
                2,
                "--ranks-per-node",
                2,
                "--current",
                TRACE,
                "--output",
                "plan.json",
            ],
            "not a plan",
        ),
    ],
)
def test_what_cannot_be_is_one_line(capsys, monkeypatch, tmp_path, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert line in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_place_writes_a_plan_that_the_next_one_starts_from(tmp_path, capsys):
    first = tmp_path / "first.json"
    second = tmp_path / "second.json"
    sizes = [
        "--nodes",
        2,
        "--ranks-per-node",
        2,
        "--hidden-size",
        128,
        "--ffn-size",
        256,
        "--origin",
        2001,
        "--horizon",
        300,
    ]
    plan = json.loads(run(capsys, "place", TRACE, *sizes, "--output", first, "--json"))
    assert plan == json.loads(first.read_text(encoding="utf-8"))
    assert np.array(plan["slot_to_expert"]).shape == (4, 16)
    assert plan["after"]["inter_node_bytes"] < plan["now"]["inter_node_bytes"]
    assert plan["actual_oracle"] is not None and plan["experts_moved"] > 0
    again = json.loads(
        run(capsys, "place", TRACE, *sizes, "--current", first, "--output", second, "--json")
    )
    assert again["experts_moved"] == 0 and again["slot_to_expert"] == plan["slot_to_expert"]


def test_the_verbs_do_without_mindspore(tmp_path):
    """As on a machine where it is not installed."""
    script = (
        "import sys; sys.modules['mindspore'] = None\n"
        "from pangu_locmoe.cli import main\n"
        f"assert main(['load', 'states', {str(TRACE)!r}]) == 0\n"
        f"assert main(['load', 'forecast', {str(TRACE)!r}, '--origin', '2001', "
        "'--horizon', '50']) == 0\n"
        f"assert main(['load', 'place', {str(TRACE)!r}, '--nodes', '2', "
        f"'--ranks-per-node', '2', '--output', {str(tmp_path / 'p.json')!r}]) == 0\n"
        f"assert main(['load', 'forecast', {str(TRACE)!r}, '--horizon', '50', '--method', "
        "'lstm']) == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).resolve().parents[2],
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "lstm" in done.stderr and "MindSpore" in done.stderr


PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def table(path, rows):
    """A trace of equal rows of EPLB's published example, with `load import`."""
    lines = [
        f"{step},{layer},{expert},{tokens}"
        for step in range(1, rows + 1)
        for layer, load_E in enumerate(PUBLISHED)
        for expert, tokens in enumerate(load_E)
    ]
    path.write_text("\n".join(["step,layer,expert,tokens", *lines, ""]), encoding="utf-8")
    output = path.with_suffix(".npz")
    assert main(["load", "import", str(path), "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize("rows", [1, 2, 25, 73, 74])
def test_eplbs_published_example_is_placed_however_short(tmp_path, capsys, rows):
    trace = table(tmp_path / "row.csv", rows)
    plan = tmp_path / "plan.json"
    capsys.readouterr()
    sizes = [
        "--policy",
        "eplb",
        "--nodes",
        2,
        "--ranks-per-node",
        4,
        "--groups",
        4,
        "--replicas",
        4,
    ]
    found = json.loads(run(capsys, "place", trace, *sizes, "--output", plan, "--json"))
    assert found["slot_to_expert"] == PLACED and json.loads(plan.read_text()) == found
    note = (
        f"too short to tell: placed by the {rows} row{'' if rows == 1 else 's'} there "
        f"{'is' if rows == 1 else 'are'}; nothing is known of the load's stability"
    )
    assert (
        found["state"] == ["unknown" if rows < 74 else "stable"] * 2
        and found["capacity_factor"] == [None] * 2
    )
    assert (note in found["notes"]) == (rows < 74)
    # The plan can be started from, in its own sizes.
    again = json.loads(
        run(capsys, "place", trace, *sizes, "--current", plan, "--output", plan, "--json")
    )
    assert again["experts_moved"] == 0


def test_one_row_with_the_other_verbs(tmp_path, capsys):
    trace = table(tmp_path / "row.csv", 1)
    capsys.readouterr()
    assert run(capsys, "states", trace).strip() == "too short to tell: 1 row, the rule needs 74"
    found = json.loads(run(capsys, "states", trace, "--json", "--plot", tmp_path / "states.svg"))
    assert (found["state"], found["layer_states"], found["stable_from"]) == (
        "unknown",
        ["unknown"] * 2,
        None,
    )
    assert "too short to tell" in (tmp_path / "states.svg").read_text(encoding="utf-8")
    assert "needs 2 rows before it, there are 1" in refused(
        capsys, "forecast", trace, "--horizon", 10
    )
    assert Path(run(capsys, "report", trace).strip()).is_file()
    assert "does not say which node tokens come from" in refused(
        capsys,
        "place",
        trace,
        "--nodes",
        2,
        "--ranks-per-node",
        2,
        "--output",
        tmp_path / "no.json",
    )
    assert not (tmp_path / "no.json").exists()


def test_one_row_with_its_sources_is_placed_by_cost(tmp_path, capsys):
    """Each node's tokens go to experts of the other one: the experts change nodes."""
    source_WLNE = np.zeros((1, 1, 2, 4), np.int64)
    source_WLNE[0, 0, 0, 2:], source_WLNE[0, 0, 1, :2] = 100, 100
    write_trace(
        tmp_path / "row.npz", Trace(np.array([7]), source_WLNE.sum(axis=2), None, source_WLNE)
    )
    found = json.loads(
        run(
            capsys,
            "place",
            tmp_path / "row.npz",
            "--nodes",
            2,
            "--ranks-per-node",
            1,
            "--horizon",
            100000,
            "--output",
            tmp_path / "plan.json",
            "--json",
        )
    )
    assert [sorted(found["slot_to_expert"][0][:2]), sorted(found["slot_to_expert"][0][2:])] == [
        [2, 3],
        [0, 1],
    ]
    assert found["after"]["inter_node_bytes"] == 0 and found["state"] == ["unknown"]
