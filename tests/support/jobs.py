"""Start a script in several processes with msrun, as scripts/train_cpu_cluster.sh does, and wait
for its end.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port nobody listens on; below the range from which the system takes ports for outgoing
    connections.
    """
    start = 11000 + os.getpid() * 7 % 9000
    for port in range(start, start + 200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


def environment(**more: str) -> dict[str, str]:
    """One thread for each process: results then do not depend on how busy the machine is."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "MS_RETRY_INTERVAL_LOWER": "1",
        "MS_RETRY_INTERVAL_UPPER": "1",
        "MS_NODE_TIMEOUT": "5",
        "MS_CPU_COMM_OP_TIMEOUT": "120",
        **more,
    }


def msrun(
    ranks: int,
    folder: Path,
    *script: object,
    timeout: float = 200,
    env: Optional[dict[str, str]] = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script with its arguments on `ranks` processes in `folder`; logs in folder/logs."""
    command = [
        "msrun",
        "--worker_num",
        ranks,
        "--local_worker_num",
        ranks,
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        free_port(),
        "--join=True",
        "--log_dir",
        folder / "logs",
        *script,
    ]
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=env or environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # msrun ends its workers
        process.wait(timeout=30)
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def logs(folder: Path) -> str:
    """What the workers said, without MindSpore's warnings, for the message of a failed
    assertion.
    """
    lines = []
    for file in sorted(folder.glob("logs/worker_*.log")):
        said = [
            line
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
            if line and not line.startswith(("[WARN", "[INFO"))
        ]
        lines += [f"--- {file.name}", *said[-30:]]
    return "\n".join(lines)
