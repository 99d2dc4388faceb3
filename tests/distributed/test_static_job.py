"""The static layer in several processes: forward and gradients."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

PROGRAM = Path(__file__).resolve().parents[1] / "support" / "static_job.py"


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_two_nodes_share_a_layer(tmp_path, ranks):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        # msrun starts the first python of the PATH
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "MS_RETRY_INTERVAL_LOWER": "1",
        "MS_RETRY_INTERVAL_UPPER": "1",
    }
    command = [
        str(binaries / "msrun"),
        "--worker_num",
        str(ranks),
        "--local_worker_num",
        str(ranks),
        "--master_addr",
        "127.0.0.1",
    ]
    command += ["--master_port", str(port), "--join=True", "--log_dir", str(tmp_path), str(PROGRAM)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=180
    )
    logs = [(tmp_path / f"worker_{rank}.log").read_text() for rank in range(ranks)]
    assert done.returncode == 0, logs[0][-2000:]
    assert all(re.search("^the same$", log, re.MULTILINE) for log in logs)
