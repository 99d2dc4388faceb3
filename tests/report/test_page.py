"""The page: what it says, that hostile text stays text, and that a browser draws it without
asking anyone for anything.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.page import Page

from pangu_locmoe.errors import DataError
from pangu_locmoe.report.page import build_report

HOSTILE = (
    '</blockquote><script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)> '
    "& 人工智能\x00\ud800"
)


def make_run(
    path: Path,
    steps: int = 40,
    layers: int = 2,
    experts: int = 8,
    nodes: int = 4,
    router: str = "locmoe",
    trace: bool = True,
    summary: bool = True,
) -> Path:
    rng = np.random.default_rng(0)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        f"model:\n  num_layers: 5\n  num_moe_layers: {layers}\nmoe:\n  router: {router}\n  "
        f"num_experts: {experts}\ntrain:\n  steps: {steps}\n"
        f"parallel:\n  emulated_nodes: {nodes}\n"
    )
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 3 + 5 / step + rng.normal(0, 0.1)
        lines.append(
            {
                "step": step,
                "loss": loss,
                "cross_entropy": loss if step != 3 else math.nan,
                "balance_loss": 1.1,
                "locality_loss": None if router == "hash" else 0.4,
                "learning_rate": 1e-3,
                "grad_norm": 1.5,
                "tokens_per_second": 2000.0 + step,
                "step_seconds": 0.5,
                "capacity": None if layers == 0 else 320,
                "dropped_fraction": 0.01,
                "max_over_mean_load": 1.4,
                "local_fraction": 0.7 if nodes > 1 else None,
            }
        )
        if step % 10 == 0 or step == steps:
            lines.append(
                {
                    "step": step,
                    "validation_loss": loss,
                    "bits_per_byte": 1.75,
                    "validation_loss_by_domain": {"zh": 3.1, "en": 2.9},
                    "bits_per_byte_by_domain": {"zh": 1.8, "en": 1.7},
                }
            )
    bound = {
        "layer": 2,
        "delta": 0.31,
        "exact": 212.4,
        "erfc": math.inf,
        "exponential": "Infinity",
        "capacity": 320,
    }
    lines.append({"event": "capacity", "step": 20, "layers": [bound]})
    figures = {
        "max_over_mean_now": 1.75,
        "max_over_mean_after": 1.125,
        "inter_node_bytes_now": 4_200_000.0,
        "inter_node_bytes_after": 1_050_000.0,
    }
    lines.append(
        {
            "event": "placement",
            "step": 30,
            "policy": "locality",
            "experts_moved": 6,
            "bytes_moved": 12_582_912.0,
            "gain": 0.401,
            **figures,
        }
    )
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4'
    )
    if trace:
        source = rng.integers(0, 50, (steps, layers, nodes, experts))
        np.savez(
            path / "load.npz",
            load=source.sum(axis=2),
            step=np.arange(1, steps + 1),
            dropped=source[:, :, 0],
            source=source,
        )
    if summary:
        document = {
            "parameters": 14_812_160,
            "active_parameters": 8_103_424,
            "bigram_bits_per_byte": {"zh": 3.0, "en": 3.4, "all": 3.2},
            "final": lines[-3],
            "samples": [
                {"domain": "zh", "prompt": "你好", "text": "你好，世界"},
                {"domain": "<i>en", "prompt": HOSTILE, "text": HOSTILE},
            ],
            "corpus": {"zh": {"documents": 12}},
            "machine": {"cores": 2},
            "wall_seconds": 81.0,
        }
        (path / "summary.json").write_text(json.dumps(document))
    return path


def report(tmp_path: Path, *runs: Path) -> Page:
    return Page(build_report(list(runs), tmp_path / "out" / "report.html"))


def test_one_run_says_everything(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "first"))
    for words in (
        "Run first",
        "bits per byte",
        "byte bigram 3.200, 45.3 % below",
        "14.8 M",
        "8.1 M active",
        "tokens per second, median",
        "70 %",
        "1 min 21 s",
    ):
        assert words in page.text, words
    for words in (
        "nats per token",
        "optimizer step",
        "training time (seconds)",
        "uniform",
        "layer 2",
        "layer 3",
        "source node",
        "Byte bigram",
        "∞",
        "num_experts: 8",
        "Experts moved",
        "40.1 %",
        "4.20 → 1.05",
        "你好",
    ):
        assert words in page.text, words
    assert page.count("svg") == 4 + 5 + 2 + 3 + 4 and page.count("script") == 0
    outlines = [
        attributes
        for _, attributes in page.tags
        if "stroke: #10221c" in str(attributes.get("style"))
    ]
    assert (
        len(outlines) == 4 * 2 and "Outlined" in page.text
    )  # the local experts of each node in each sparse layer
    assert "What differs" not in page.text and "Not recorded" not in page.text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run")
    for name in (
        "metrics.jsonl",
        "summary.json",
    ):  # a domain, a corpus entry and a configuration key are as hostile as a sample
        (run / name).write_text(
            (run / name)
            .read_text()
            .replace('"en"', json.dumps(HOSTILE))
            .replace('"documents"', json.dumps(HOSTILE))
        )
    with (run / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("hostile: '<script>alert(2)</script>'\n")
    page = report(tmp_path, run)
    assert page.count("script") == page.count("img") == 0
    assert (
        page.count("b") == page.count("figure") and page.count("i") == 2
    )  # one title per figure, one legend of two domains
    assert (
        '<script>alert("x")</script>' in page.text
        and "<b>run" in page.text
        and "<i>en" in page.text
        and "人工智能" in page.text
    )
    assert "\x00" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_several_runs_are_compared(tmp_path: Path) -> None:
    page = report(
        tmp_path,
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", router="hash", steps=20),
        make_run(tmp_path / "x" / "a"),
    )
    assert (
        "Comparison of 3 runs" in page.text
        and f"{tmp_path.name}/a" in page.text
        and "x/a" in page.text
    )
    differing = page.text.split("What differs")[1].split("Loss against steps")[0]
    assert (
        "moe.router" in differing and "train.steps" in differing and "num_experts" not in differing
    )
    styles = " ".join(
        str(attributes.get("style")) for tag, attributes in page.tags if tag == "path"
    )
    assert (
        all(f"stroke: var(--c{colour})" in styles for colour in range(3)) and "#fe00" not in styles
    )
    assert page.count("details") == 6


def test_charts_share_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    page = report(tmp_path, run, run, make_run(tmp_path / "b", nodes=1, trace=False))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    used = {
        str(value)[1:]
        for _, attributes in page.tags
        if (value := attributes.get("xlink:href")) and value[0] == "#"
    }
    assert len(ids) == len(set(ids)) and used <= set(ids)
    assert page.count("style") == 1, "a chart's own style sheet would style the whole page"


def test_the_same_run_twice_gets_two_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    page = report(tmp_path, run, run)
    assert f"{tmp_path.name}/a (2)" in page.text and "The configurations are the same" in page.text


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_runs(tmp_path: Path, steps: int) -> None:
    page = report(tmp_path, make_run(tmp_path / "short", steps=steps))
    assert page.count("svg") == 18
    assert "nan" not in " ".join(str(attributes.get("d")) for _, attributes in page.tags)


def test_missing_pieces(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "bare", trace=False, summary=False, nodes=1))
    assert (
        "unfinished" in page.text
        and "No expert load was traced" in page.text
        and "no byte-bigram baseline" in page.text
    )
    assert (
        "Not recorded: tokens that stay in their node" in page.text
        and "40 steps, sum of step times" in page.text
    )
    assert "Samples" not in page.text


def test_a_run_without_sparse_layers(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "dense", layers=0, nodes=1))
    assert (
        "No expert load was traced" in page.text
        and "expert capacity" in page.text.split("Not recorded: ")[1]
    )


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "config.yaml").write_text("model: null\n")
    (run / "metrics.jsonl").write_text("")
    assert "no training rows yet" in report(tmp_path, run).text
    assert "no training rows yet" in report(tmp_path, run, make_run(tmp_path / "other")).text


def test_idle_experts_and_empty_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "idle")
    load = np.zeros((40, 2, 8), dtype=np.int64)
    load[5:, :, 0] = 100
    np.savez(run / "load.npz", load=load, step=np.arange(1, 41))
    page = report(tmp_path, run)
    assert "Idle experts" in page.text and "100 %" in page.text and "source node" not in page.text


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", steps=20_000, layers=4, experts=64, nodes=1)
    assert len(build_report([run] * 3, tmp_path / "long.html").read_bytes()) < 3_000_000


def test_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one run"):
        build_report([], tmp_path / "report.html")
    with pytest.raises(DataError, match="not a run directory"):
        build_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        build_report([make_run(tmp_path / "run")], tmp_path / "file" / "report.html")


def test_the_report_does_not_import_mindspore() -> None:
    code = "import sys, pangu_locmoe.report.page; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_browser_draws_it(tmp_path: Path) -> None:
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome on PATH")
    built = build_report(
        [make_run(tmp_path / "a"), make_run(tmp_path / "b")], tmp_path / "report.html"
    )
    # The page itself has no script; this copy gets one that measures it, and a policy that admits
    # just that one.
    measure = (
        "<script>addEventListener('load',()=>{const "
        "b=[...document.querySelectorAll('svg,svg "
        "image')].map(s=>s.getBoundingClientRect());"
        "document.title=JSON.stringify({svgs:document.querySelectorAll('svg').length,small:b.filter(r=>r.width<5||r.height<5).length,"
        "requests:performance.getEntriesByType('resource').filter(r=>!r.name.startsWith('data:')).length,"
        "wide:document.documentElement.scrollWidth-innerWidth})})</script>"
    )
    page = built.read_text(encoding="utf-8")
    tags = " ".join(re.findall("<[^>]*>", page))
    assert (
        "default-src 'none'" in page
        and not re.search(r"(?:src|href)=(?![\"'](?:data:|#))", tags)
        and "url(" not in page
        and "@import" not in page
    )
    copy = tmp_path / "measured.html"
    copy.write_text(
        page.replace(
            "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
        ).replace("</body>", measure + "</body>"),
        encoding="utf-8",
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    more = [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--window-size=500,900",
        "--virtual-time-budget=2000",
        "--dump-dom",
        copy.as_uri(),
    ]
    done = subprocess.run(
        [browser, *flags, *more], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Refused" in line]
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found, done.stdout[:300]
    measured = json.loads(found.group(1))
    assert (
        measured["svgs"] == page.count("<svg ")
        and measured["small"] == 0
        and measured["requests"] == 0
    )
    assert measured["wide"] <= 0, "the page scrolls sideways on a narrow screen"
