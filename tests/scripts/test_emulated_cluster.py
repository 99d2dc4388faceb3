"""scripts/emulate_cluster.sh: two nodes train, the ledger agrees with the links, and nothing is
left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from comparison import links

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.alone

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"),
    reason="network namespaces need root and iproute2",
)
TINY = {
    "model.vocab_size": 300,
    "model.hidden_size": 32,
    "model.num_layers": 3,
    "model.num_moe_layers": 2,
    "model.ffn_size": 32,
    "model.num_heads": 2,
    "model.seq_length": 32,
    "moe.router": "hash",
    "moe.levels": 1,
    "train.batch_size": 32,
    "train.warmup_steps": 0,
    "evaluation.every": 1000,
    "evaluation.sequences": 4,
    "checkpoint.every": 1000,
    "sample.tokens": 0,
    "parallel.nodes": 2,
}


def left_behind() -> str:
    spaces = subprocess.run(
        ["ip", "netns", "list"], text=True, capture_output=True, check=True
    ).stdout
    interfaces = subprocess.run(
        ["ip", "-o", "link"], text=True, capture_output=True, check=True
    ).stdout
    return "\n".join(re.findall(r"moe\d+[nbv]\d*", spaces + interfaces))


def command(folder: Path, steps: int) -> list[str]:
    corpus = folder / "corpus"
    if not corpus.exists():
        for domain in ("left", "right"):
            (corpus / domain).mkdir(parents=True)
            for number in range(40):
                text = " ".join(
                    f"{domain} {number} {position * number % 17}" for position in range(60)
                )
                (corpus / domain / f"{number}.txt").write_text(text)
        sources = [{"path": str(corpus / domain), "domain": domain} for domain in ("left", "right")]
        (folder / "config.yaml").write_text(
            json.dumps({"data": {"sources": sources, "prepared_dir": str(folder / "prepared")}})
        )
    values = {**TINY, "train.steps": steps}
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    return [
        "bash",
        "scripts/emulate_cluster.sh",
        str(folder / "config.yaml"),
        "--rate",
        "100mbit",
        "--run-dir",
        str(folder / "run"),
        "--no-progress",
        *sets,
    ]


def test_only_root_may(tmp_path):
    """The refusal is one line; `id` is replaced, so that it is tested as root too."""
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "scripts/emulate_cluster.sh"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environment,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"emulate_cluster\.sh: only root may make network namespaces.*\n", done.stderr
    )


@pytest.mark.parametrize(
    "arguments", [["--nodes", "0"], ["--rate", "fast"], ["--ranks-per-node", "two"], ["--rate"]]
)
def test_refuses(arguments):
    done = subprocess.run(
        ["bash", "scripts/emulate_cluster.sh", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith(f"emulate_cluster.sh: {arguments[0]} ")
        and done.stderr.count("\n") == 1
    )


def test_account_takes_headers_and_gradients_off():
    steps = links.per_step(
        [
            {"step": 1, "bytes": 0, "packets": 0, "ledger": 500, "reduced": 999},
            {"step": 2, "bytes": 3000 + 66 * 10, "packets": 10, "ledger": 500, "reduced": 999},
            {"event": 2, "bytes": 9000, "packets": 20, "ledger": None, "reduced": None},
            {"step": 3, "bytes": 12000, "packets": 30, "ledger": 500, "reduced": 999},
        ]
    )
    assert [step["step"] for step in steps] == [2]  # an evaluation lies before step 3
    account = links.account(steps)
    assert account["exchange_payload_bytes"] == 3000 - 1998
    assert account["ledger_error"] == pytest.approx(2 / 1002 * -1)


@needs_root
@pytest.mark.slow
def test_the_ledger_agrees_with_the_links(tmp_path):
    job = subprocess.Popen(
        command(tmp_path, 12), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = job.communicate(timeout=400)
    assert job.returncode == 0, output
    assert f"moe{job.pid}" not in left_behind()
    account = json.loads((tmp_path / "run" / "links.json").read_text())["account"]
    assert account["steps"] == 11 and account["ledger_bytes"] > 0
    assert abs(account["ledger_error"]) < 0.05


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_nothing_behind(tmp_path, number):
    """After Ctrl-C at once; after kill -9, which nothing can act on, when the next job begins."""
    job = subprocess.Popen(
        command(tmp_path, 100_000), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert f"moe{job.pid}n0" in left_behind()
        job.send_signal(number)
        assert job.wait(120) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    finally:
        job.kill()
    if number == signal.SIGKILL:
        # Any later job cleans up before it looks at its configuration.
        subprocess.run(
            ["bash", "scripts/emulate_cluster.sh", str(tmp_path / "absent.yaml")],
            cwd=ROOT,
            capture_output=True,
            timeout=60,
        )
    assert f"moe{job.pid}n0" not in left_behind()
