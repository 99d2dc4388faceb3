"""The page about a load trace: what it says, that it says what it cannot show, and that it stays
one small, whole file.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.page import Page

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.trace import Trace, read_trace, write_trace
from pangu_locmoe.report.expert_load.charts import local_fraction
from pangu_locmoe.report.expert_load.errors import HORIZONS, METHODS, MIN_PAST, rolling_origins
from pangu_locmoe.report.expert_load.page import build_load_report

RECORDED = Path(__file__).parent.parent / "data" / "traces" / "locmoe-1.npz"


def make_trace(
    rows: int = 400,
    layers: int = 2,
    experts: int = 4,
    nodes: int = 2,
    stride: int = 1,
    settle: int = 60,
) -> Trace:
    """Shares that swing up to row `settle` and then stay; node n prefers the experts of its own
    block.
    """
    rng = np.random.default_rng(0)
    logits_WLE = (
        rng.normal(0, 0.3, (1, layers, experts))
        + 1.5 * rng.normal(size=(rows, layers, experts)) * (np.arange(rows) < settle)[:, None, None]
    )
    home_NE = np.where(np.arange(experts) * nodes // experts == np.arange(nodes)[:, None], 0.8, 0.0)
    weight_WLNE = np.exp(logits_WLE[:, :, None] + home_NE)
    share_WLNE = weight_WLNE / weight_WLNE.sum(axis=3, keepdims=True)
    source_WLNE = rng.multinomial(512, share_WLNE)
    load_WLE = source_WLNE.sum(axis=2)
    return Trace(1 + stride * np.arange(rows), load_WLE, load_WLE // 10, source_WLNE)


def write(tmp_path: Path, trace: Trace) -> Path:
    file = tmp_path / "a run" / "load.npz"
    file.parent.mkdir(exist_ok=True)
    write_trace(file, trace)
    return file


def report(tmp_path: Path, trace: Trace) -> Page:
    return Page(build_load_report(write(tmp_path, trace), tmp_path / "out" / "report.html"))


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


def test_the_recorded_trace_says_everything(tmp_path: Path) -> None:
    begin = time.monotonic()
    page = Page(build_load_report(RECORDED, tmp_path / "report.html"))
    assert time.monotonic() - begin < 20
    text = words(page)
    for part in (
        "Expert load of locmoe-1.npz",
        "2,400 rows, 4 sparse layers, 16 experts",
        "one each step",
        "1,536",
        "2 nodes",
        "stable from step 1,056",
    ):
        assert part in text, part
    for part in (
        "MoE layer 0: stable from step 793",
        "25 windows of 50 rows",
        "WAPE, %",
        "MAE, points",
        "sampling alone",
        "best constant, in hindsight",
    ):
        assert part in text, part
    for horizon in HORIZONS:
        assert f"{horizon:,} steps, transient" in text and f"{horizon:,} steps, stable" in text
    for part in (
        *METHODS,
        "arima",
        "mean error ratio per MoE layer",
        "0.25 %",
        "cannot be compared exactly",
        "Tokens that stay in their node",
    ):
        assert part in text, part
    assert "are not shown" not in text and 'class="notes"' not in (
        tmp_path / "report.html"
    ).read_text(encoding="utf-8")
    assert page.count("svg") == 4 + 1 + 1 + 1 and page.count("script") == page.count("img") == 0
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_the_errors_are_those_of_a_back_test(tmp_path: Path) -> None:
    """A stationary layer: a window mean is as good as sampling allows, the last value worse by
    about the square root of 2.
    """
    page = report(tmp_path, make_trace(600, settle=0))
    rows = {
        row[0]: row[1:]
        for row in re.findall(
            r"\b(window_mean|last|sampling alone) ([\d.]+)", words(page).split("WAPE, %")[1]
        )[:3]
    }
    mean, last, floor = (float(rows[name][0]) for name in ("window_mean", "last", "sampling alone"))
    assert mean == pytest.approx(floor, rel=0.1) and last == pytest.approx(1.41 * floor, rel=0.2)


def test_origins_have_rows_behind_and_the_horizon_ahead() -> None:
    trace = make_trace(400)
    for stable_from in (None, 5, 120, 399, 10_000):
        for horizon in (100, 350):
            origins = rolling_origins(trace, horizon, stable_from)
            assert origins and origins[0] > MIN_PAST and origins[-1] + horizon <= 401
    assert {origin < 120 for origin in rolling_origins(trace, 100, 120)} == {True, False}
    assert rolling_origins(trace, 500, None) == []


@pytest.mark.parametrize("rows", [1, 2, 20, 73])
def test_a_short_trace_says_what_is_missing(tmp_path: Path, rows: int) -> None:
    page = report(tmp_path, make_trace(rows, settle=0))
    text = words(page)
    assert (
        f"States: {rows} row{'s' if rows > 1 else ''} cannot tell, the rule needs 74" in text
        and "MoE layer 0: too short to tell" in text
    )
    assert (
        "transient at the last step" not in text
        and "The model: too short to tell" in text
        and "MoE layer 0 unknown" in text
    )
    assert "No errors to show" in text and f"covers {rows} steps" in text and "0.25 %" in text
    assert "nan" not in " ".join(str(attributes.get("d")) for _, attributes in page.tags)
    assert page.count("svg") == 2 + (rows >= 50) + 1


def test_a_trace_that_covers_only_the_short_horizon(tmp_path: Path) -> None:
    text = words(report(tmp_path, make_trace(200)))
    assert (
        "100 steps, transient" in text and "Horizons of 500 and 1,000 steps are not shown" in text
    )


def test_a_trace_without_sources(tmp_path: Path) -> None:
    trace = make_trace(110)
    page = report(tmp_path, Trace(trace.step_W, trace.load_WLE))
    text = words(page)
    assert (
        "does not say which node tokens come from" in text
        and "Tokens that stay in their node" not in text
    )
    assert text.count("not recorded") == 2  # sources and drops
    assert page.count("svg") == 2 + 1


@pytest.mark.parametrize(
    "experts, nodes, reason",
    [(4, 1, "there is one node"), (5, 2, "2 nodes do not divide 5 experts")],
)
def test_sources_that_do_not_tell_locality(
    tmp_path: Path, experts: int, nodes: int, reason: str
) -> None:
    text = words(report(tmp_path, make_trace(90, experts=experts, nodes=nodes)))
    assert f"Not shown: tokens that stay in their node: {reason}" in text


def test_local_tokens_are_counted() -> None:
    """All tokens of node 0 go to expert 0, its own; those of node 1 to expert 1, which is not."""
    source_WLNE = np.zeros((3, 1, 2, 4), np.int64)
    source_WLNE[:2, :, 0, 0], source_WLNE[:2, :, 1, 1] = 30, 10
    local_WL = local_fraction(Trace(np.arange(1, 4), source_WLNE.sum(axis=2), None, source_WLNE))
    np.testing.assert_array_equal(local_WL, [[0.75], [0.75], [np.nan]])


def test_dead_experts_and_empty_rows(tmp_path: Path) -> None:
    trace = make_trace(300)
    load_WLE = trace.load_WLE.copy()
    load_WLE[:, :, 3] = 0
    load_WLE[10:20] = 0
    page = report(tmp_path, Trace(trace.step_W, load_WLE))
    row = re.search(r"MoE layer 0 (?:stable|transient) \S+ (.*?) MoE layer 1", words(page))
    assert row and row[1].endswith("0 % 1")  # the smallest share, and how many were never used
    assert "nan" not in words(page).lower() and "median; 0 to 1,024" in words(page)


def test_no_tokens_at_all(tmp_path: Path) -> None:
    page = report(tmp_path, Trace(np.arange(1, 201), np.zeros((200, 1, 3), np.int64)))
    assert "Expert load of a run" in page.text and "nan" not in words(page).lower()


@pytest.mark.parametrize(
    "stride, shown",
    [
        (10, "100 steps, "),
        (200, "Horizons of 100 steps are not shown"),
        (2000, "No errors to show"),
    ],
)
def test_strides(tmp_path: Path, stride: int, shown: str) -> None:
    text = words(report(tmp_path, make_trace(120, stride=stride)))
    assert f"one every {stride:,} steps" in text and shown in text


def test_uneven_steps(tmp_path: Path) -> None:
    trace = make_trace(300)
    keep = np.flatnonzero(np.arange(300) % 7 != 3)
    assert "not evenly spaced" in words(
        report(tmp_path, Trace(trace.step_W[keep], trace.load_WLE[keep]))
    )


def test_many_layers_and_experts_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trace = Trace(np.arange(1, 401), rng.poisson(40.0, (400, 26, 80)))
    file = build_load_report(write(tmp_path, trace), tmp_path / "report.html")
    text = words(Page(file))
    assert (
        "the first 24 of 26 layers are drawn" in text
        and "16 are left out" in text
        and "the most restless layer" in text
    )
    assert file.stat().st_size < 3_000_000


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    folder = tmp_path / "<script>x"
    folder.mkdir()
    write_trace(folder / "load.npz", make_trace(3))
    page = Page(build_load_report(folder / "load.npz", tmp_path / "report.html"))
    assert "Expert load of <script>x" in page.text and page.count("script") == 0


def test_charts_share_a_page(tmp_path: Path) -> None:
    page = report(tmp_path, make_trace(200))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and page.count("style") == 1
    source = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "#fe00" not in source and "default-src 'none'" in source and "url(http" not in source


def test_errors_are_one_line(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    (tmp_path / "bad.npz").write_text("no trace")
    for file, says in (
        (tmp_path / "absent.npz", "does not exist"),
        (tmp_path / "bad.npz", "not a load trace"),
        (tmp_path, r"load\.npz: not a load trace: it does not exist"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            build_load_report(file, output)
        assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        build_load_report(write(tmp_path, make_trace(2)), tmp_path / "file" / "report.html")
    assert not output.exists()


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: Any) -> None:
    output = build_load_report(write(tmp_path, make_trace(2)), tmp_path / "report.html")
    before = output.read_bytes()

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        build_load_report(write_elsewhere(tmp_path), output)
    assert output.read_bytes() == before and [path.name for path in tmp_path.glob(".report*")] == []


def write_elsewhere(tmp_path: Path) -> Path:
    np.savez(tmp_path / "other.npz", step=np.arange(1, 4), load=np.ones((3, 1, 2), np.int64))
    assert len(read_trace(tmp_path / "other.npz").step_W) == 3
    return tmp_path / "other.npz"


def test_the_report_does_not_import_mindspore() -> None:
    code = "import sys, pangu_locmoe.report.expert_load.page; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
