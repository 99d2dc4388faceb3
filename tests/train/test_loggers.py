"""Runs on W&B and SwanLab: what they get, and that they cannot harm a run."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
from support import tiny

from pangu_locmoe.cli import main
from pangu_locmoe.config import load_config
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.train import loggers
from pangu_locmoe.train.loggers import IDS_FILE, WriteToService, make_loggers
from pangu_locmoe.train.run import train

ROW = {"step": 1, "loss": 2.5, "capacity": None}
VALIDATION = {"step": 2, "bits_per_byte_by_domain": {"zh": 1.5}}


def config(**logging: Any):
    return tiny.tiny_config(
        model={"num_layers": 2, "num_moe_layers": 0},
        train={"steps": 3, "mode": "pynative"},
        evaluation={"every": 3, "sequences": 1},
        checkpoint={"every": 2},
        logging=logging,
    )


class Recorded:
    """A package that keeps what it gets, and fails when it is told to."""

    def __init__(self, fails_at: int = 99, begins: bool = True) -> None:
        self.begun: list[tuple[str, bool]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self._fails_at = fails_at
        self._begins = begins

    def begin(self, identifier: str, resumed: bool) -> None:
        if not self._begins:
            raise SystemExit("no login")
        self.begun.append((identifier, resumed))

    def log(self, numbers: dict[str, float], step: int) -> None:
        if step >= self._fails_at:
            raise RuntimeError("the service\nis gone")
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


def use(monkeypatch: pytest.MonkeyPatch, service: Recorded) -> None:
    monkeypatch.setitem(loggers._SERVICES, "wandb", lambda *_: service)
    monkeypatch.setattr(loggers, "check_loggers", lambda _: None)


def test_a_logger_that_fails_in_the_middle_costs_the_run_nothing(tmp_path, monkeypatch, capsys):
    service = Recorded(fails_at=2)
    use(monkeypatch, service)
    assert train(config(wandb={}), tmp_path / "run", progress=False) is None
    rows = [row for row in tiny.rows(tmp_path / "run", timing=True) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    ((step, numbers),) = service.logged
    expected = {f"train/{key}": value for key, value in rows[0].items() if value is not None}
    del expected["train/step"]
    assert step == 1 and numbers == pytest.approx(expected)
    assert service.finished == 0
    said = capsys.readouterr().out
    assert said.count("note: logging.wandb: the service is gone; the run goes on without it") == 1
    # Another logger, or none, does not make it another run; and the same run is gone on with.
    again = Recorded()
    use(monkeypatch, again)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if folder.name == "step-00000003":
            (folder / "state.json").unlink()
    assert train(config(wandb={}), tmp_path / "run", resume=True, progress=False) is None
    assert again.begun == [(service.begun[0][0], True)] and again.finished == 1
    assert [step for step, _ in again.logged] == [3, 3]  # a training and a validation row
    assert "validation/bits_per_byte_by_domain/zh" in again.logged[1][1]


def test_one_that_cannot_begin_is_refused_and_a_resumed_run_goes_on_without(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"^logging\.wandb: cannot begin: no login; mode: "):
        WriteToService("wandb", Recorded(begins=False), 1).begin(tmp_path, False)
    logger = WriteToService("wandb", Recorded(begins=False), 1)
    logger.begin(tmp_path, True)
    logger.on_row(VALIDATION)
    logger.close()
    assert "note: logging.wandb: no login; the run goes on without it" in capsys.readouterr().out


def test_one_that_does_not_end_is_left_behind(tmp_path, monkeypatch, capsys):
    import threading

    class Stuck(Recorded):
        def finish(self) -> None:
            threading.Event().wait()

    monkeypatch.setattr(loggers, "_FINISH", 0.05)
    WriteToService("wandb", Stuck(), 1).close()
    assert "note: logging.wandb: did not end in 0 s; left behind" in capsys.readouterr().out


def test_rows_between_those_of_metrics_are_not_logged(tmp_path):
    service = Recorded()
    logger = WriteToService("wandb", service, 2)
    for step in (1, 2, 3, 4):
        logger.on_step(step, None, {**ROW, "step": step})  # type: ignore[arg-type]
    logger.on_row({"step": 4, "event": "capacity", "layers": []})
    assert service.logged == [(step, {"train/loss": 2.5}) for step in (1, 2, 4)]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_package_that_is_not_there_is_one_line_before_anything_starts(
    name, tmp_path, monkeypatch, capsys
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda one, *a: None if one == name else found(one, *a)
    )
    file = tiny.write(config(**{name: {}}), tmp_path)
    assert main(["train", str(file), "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"pangu-locmoe: logging.{name}: needs the package {name}: "
        f"pip install 'pangu_locmoe[{name}]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_of_its_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "notwandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(loggers, "_wanted", lambda _: ["notwandb"])
    with pytest.raises(ConfigError, match=r"^logging\.notwandb: needs the package notwandb"):
        loggers.check_loggers(config())


def test_nothing_is_imported_that_is_not_asked_for():
    code = (
        "import sys, pangu_locmoe.train.run; "
        "print({'wandb', 'swanlab', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    "key, value", [("mode", "cloud"), ("project", ""), ("token", "x"), ("name", 3)]
)
def test_what_is_not_known_is_refused(key, value, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"logging": {"swanlab": {key: value}}}))
    with pytest.raises(ConfigError, match=rf"^logging\.swanlab\.{key} = "):
        load_config(file)


def offline(name: str, run_dir: Path, resumed: bool) -> None:
    """One start of a run: a training and a validation row."""
    (logger,) = make_loggers(config(**{name: {"mode": "offline", "name": "mine"}}), run_dir)
    logger.begin(run_dir, resumed)
    logger.on_step(1, None, ROW)  # type: ignore[arg-type]
    logger.on_row(VALIDATION)
    logger.close()


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    offline("wandb", tmp_path, False)
    offline("wandb", tmp_path, True)
    identifier = json.loads((tmp_path / IDS_FILE).read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{identifier}.wandb"))
    assert len(files) == 2
    for file in files:
        assert _wandb_history(file) == [
            {"train/loss": 2.5, "step": 1},
            {"validation/bits_per_byte_by_domain/zh": 1.5, "step": 2},
        ]


def _wandb_history(file: Path) -> list[dict[str, Any]]:
    """The rows of a .wandb file, without what W&B adds."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in _records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def _records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format behind a header of 7 bytes: blocks of 32 KB, records of checksum,
    length, kind (1 whole, 2 first, 3 middle, 4 last part) and data.
    """
    at = 7
    parts = b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_swanlab_offline(tmp_path):
    pytest.importorskip("swanlab", reason="the extra swanlab is not installed")
    offline("swanlab", tmp_path, False)
    written = b"".join(
        file.read_bytes() for file in (tmp_path / "swanlog").rglob("*") if file.is_file()
    )
    for name in (b"train/loss", b"validation/bits_per_byte_by_domain/zh", b"mine"):
        assert name in written
