"""Is this server ready for its part of an Ascend job? Called by train_ascend.sh; needs Python only.

One line for each check on standard output. Exit code 0: ready; 3: not, and the lines that begin
with `not ready:` say why. `--fingerprint` prints only the hash of the configuration and the code,
which must be the same on every server.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
MINDSPORE = "2.10."
HCCL_PORTS = 16
# Where CANN's installer puts it for root, before and from 8.5 on, and for others.
SET_ENV = [
    base / folder / "set_env.sh"
    for base in (Path("/usr/local/Ascend"), Path.home() / "Ascend")
    for folder in ("ascend-toolkit", "cann")
]

Finding = Tuple[bool, str]


def fingerprint(config: Path, overrides: List[str]) -> str:
    """Of the configuration with its bases, what --set changes in it, and all code that training
    runs.
    """
    digest = hashlib.sha256()
    files: List[Path] = sorted((ROOT / "pangu_locmoe").rglob("*.py"))
    for file in files:
        digest.update(
            file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0"
        )
    seen: List[Path] = []
    layer: Optional[Path] = config
    while layer is not None and layer.resolve() not in seen:
        text = layer.read_text(encoding="utf-8")
        digest.update(text.encode() + b"\0")
        seen.append(layer.resolve())
        base = re.search(r"^base:\s*([^\s#]+)", text, re.MULTILINE)
        layer = layer.parent / base.group(1).strip("\"'") if base else None
    for override in overrides:
        digest.update(override.encode() + b"\0")
    return digest.hexdigest()[:16]


def driver(ranks: int) -> Iterator[Finding]:
    """The driver answers and there are enough devices."""
    if shutil.which("npu-smi") is None:
        yield (
            False,
            (
                "npu-smi is not on the PATH: the driver is not installed, or /usr/local/sbin "
                "is not in this shell's PATH"
            ),
        )
    else:
        try:
            done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=60)
            yield done.returncode == 0, f"npu-smi info: exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            yield False, "npu-smi info: no answer within 60 seconds"
    devices = [
        file for file in Path("/dev").glob("davinci*") if re.fullmatch(r"davinci\d+", file.name)
    ]
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else len(devices)
    yield count >= ranks, f"{count} devices for {ranks} ranks"
    info = Path("/usr/local/Ascend/driver/version.info")
    if info.is_file():
        yield True, f"driver: {_first_line(info, 'Version=')}"


def software() -> Iterator[Finding]:
    """CANN's environment is loaded, MindSpore is the version this project is written for, and each
    is one that the other knows.
    """
    home = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
    if home is None:
        found = [str(file) for file in SET_ENV if file.is_file()]
        where = found or [" or, from CANN 8.5 on, ".join(map(str, SET_ENV[:2]))]
        yield False, f"CANN's environment is not loaded: source {where[0]}"
    else:
        yield cann(Path(home))
        yield from packages()
    try:
        version = importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        yield False, f"MindSpore is not installed for {sys.executable}"
    else:
        yield version.startswith(MINDSPORE), f"MindSpore {version}, wanted {MINDSPORE}x"


def cann(home: Path) -> Finding:
    """CANN is there, and of a version that MindSpore's own run_check accepts."""
    if not home.is_dir():
        return False, f"CANN in {home}: no such folder"
    for file in (home / "compiler" / "version.info", home / "version.cfg"):
        if file.is_file():
            line = _first_line(file, "version=")
            break
    else:
        return True, f"CANN in {home}: version unknown"
    number = re.search(r"(\d+\.\d+)", line)
    accepted = accepted_cann()
    known = number is None or not accepted or number[1] in accepted
    wanted = "" if known else f"; this MindSpore is for {', '.join(accepted)}"
    return known, f"CANN in {home}: {line}{wanted}"


def accepted_cann() -> List[str]:
    """The versions of CANN in MindSpore's own check, read without loading it; empty: not found."""
    spec = importlib.util.find_spec("mindspore")
    if spec is None or spec.origin is None:
        return []
    file = Path(spec.origin).parent / "run_check" / "_check_version.py"
    if not file.is_file():
        return []
    _, _, checker = file.read_text(encoding="utf-8").partition("class AscendEnvChecker")
    listed = re.search(r"self\.version = \[([^\]]*)\]", checker)
    return re.findall(r"[\d.]+", listed[1]) if listed else []


def packages() -> Iterator[Finding]:
    """CANN's own Python packages, which MindSpore imports."""
    for name in ("hccl", "te"):
        found = importlib.util.find_spec(name) is not None
        mend = (
            ""
            if found
            else (f": not found by {sys.executable}; set_env.sh puts it on the PYTHONPATH")
        )
        yield found, f"Python package {name}{mend}"


def ports(master_port: Optional[int]) -> Iterator[Finding]:
    """The scheduler's port, on the first server only, and HCCL's own."""
    if master_port is not None:
        yield (
            _free(master_port),
            (
                f"port {master_port} of the scheduler is "
                f"{'free' if _free(master_port) else 'in use: give another --master-port'}"
            ),
        )
    first = int(os.environ.get("HCCL_IF_BASE_PORT", "60000"))
    taken = [port for port in range(first, first + HCCL_PORTS) if not _free(port)]
    yield (
        not taken,
        (
            f"HCCL's ports {first}-{first + HCCL_PORTS - 1}: "
            f"{'free' if not taken else f'in use: {taken}; set HCCL_IF_BASE_PORT'}"
        ),
    )


def disk(folder: Path, gigabytes: float) -> Iterator[Finding]:
    """Room for checkpoints."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    yield free >= gigabytes, f"{free:.0f} GB free for the run directory, wanted {gigabytes:g}"


def same_code(own: str, expected: Optional[str]) -> Iterator[Finding]:
    """The fingerprint is that of the server that started the job."""
    if expected is None:
        yield True, f"configuration and code: {own}"
    else:
        yield own == expected, f"configuration and code: {own}, on the first server {expected}"


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _first_line(file: Path, prefix: str) -> str:
    lines = [
        line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return next(
        (line for line in lines if line.lower().startswith(prefix.lower())),
        lines[0] if lines else "empty",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--fingerprint", action="store_true")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--master-port", type=int)
    parser.add_argument("--run-dir", type=Path, default=Path("runs"))
    parser.add_argument("--disk-gb", type=float, default=50)
    parser.add_argument("--expect")
    options = parser.parse_args()
    own = fingerprint(options.config, options.set)
    if options.fingerprint:
        print(own)
        return 0
    findings = [
        *driver(options.ranks),
        *software(),
        *ports(options.master_port),
        *disk(options.run_dir.resolve(), options.disk_gb),
        *same_code(own, options.expect),
    ]
    for good, text in findings:
        print(f"{'ready' if good else 'not ready'}: {text}")
    return 0 if all(good for good, _ in findings) else 3


if __name__ == "__main__":
    sys.exit(main())
