"""Runs on W&B and SwanLab: one callback, and how each of the packages is called.

The packages are imported where the configuration asks for them, on rank 0 alone. Whatever one of
them does after the run has begun costs its own record and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Protocol

from tqdm import tqdm

from pangu_locmoe.config import Config
from pangu_locmoe.config.models import SwanlabConfig, WandbConfig
from pangu_locmoe.errors import ConfigError
from pangu_locmoe.files import json_text, write_atomic
from pangu_locmoe.train.callbacks import Callback, scalars
from pangu_locmoe.train.metrics import Row
from pangu_locmoe.train.step import StepResult

IDS_FILE = "logging.json"
"""In the run directory: the logged run's id by package, with which a resumed run goes on."""
_FINISH = 60.0
"""Seconds that a package has to send the rest at the end; without a network it would wait for ever."""


class Service(Protocol):
    """A package that keeps runs. Its calls may raise anything."""

    def begin(self, identifier: str, resumed: bool) -> None: ...

    def log(self, numbers: Dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class WriteToService(Callback):
    """Every number of every row, under the names that TensorBoard has: train/loss, ..."""

    def __init__(self, name: str, service: Service, every: int) -> None:
        self._name = name
        self._service: Optional[Service] = service
        self._every = every

    def begin(self, run_dir: Path, resumed: bool) -> None:
        """Raises ConfigError where a new run cannot begin; a resumed one goes on without."""
        assert self._service is not None
        try:
            self._service.begin(_identifier(run_dir, self._name), resumed)
        except (Exception, SystemExit) as error:
            if not resumed:
                raise ConfigError(
                    f"logging.{self._name}: cannot begin: {_one_line(error)}; mode: offline needs "
                    "neither network nor login"
                ) from None
            self._give_up(error)

    def on_step(self, step: int, result: StepResult, row: Row) -> None:
        if step % self._every == 0 or step == 1:
            self._log("train", row)

    def on_row(self, row: Row) -> None:
        if "event" not in row:
            self._log("validation", row)

    def close(self) -> None:
        if self._service is None:
            return
        thread = threading.Thread(
            target=self._try, args=(self._service.finish,), daemon=True, name=self._name
        )
        thread.start()
        thread.join(_FINISH)
        if thread.is_alive():
            tqdm.write(f"note: logging.{self._name}: did not end in {_FINISH:.0f} s; left behind")

    def _log(self, group: str, row: Row) -> None:
        if self._service is not None:
            service = self._service
            self._try(lambda: service.log(dict(scalars(group, row)), row["step"]))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self._service = None
        tqdm.write(
            f"note: logging.{self._name}: {_one_line(error)}; the run goes on without it, and "
            "metrics.jsonl has everything"
        )


class Wandb:
    """https://docs.wandb.ai"""

    def __init__(self, config: Config, run_dir: Path) -> None:
        assert config.logging.wandb is not None
        self._values: WandbConfig = config.logging.wandb
        self._config = config
        self._run_dir = run_dir
        self._package = importlib.import_module("wandb")
        self._run: Any = None

    def begin(self, identifier: str, resumed: bool) -> None:
        values = self._values
        online = values.mode == "online"
        self._run = self._package.init(
            project=values.project,
            entity=values.entity,
            name=values.name or self._run_dir.resolve().name,
            id=identifier,
            dir=str(self._run_dir),
            mode=values.mode,
            # Offline there is nothing to look the id up in; what is synchronised has it.
            resume="allow" if online else None,
            config=self._config.model_dump(mode="json"),
            settings=self._package.Settings(console="off", silent=True),
        )
        # Steps that a restart does again come again; W&B's own step refuses to go back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: Dict[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def finish(self) -> None:
        self._run.finish()


class Swanlab:
    """https://docs.swanlab.cn"""

    def __init__(self, config: Config, run_dir: Path) -> None:
        assert config.logging.swanlab is not None
        self._values: SwanlabConfig = config.logging.swanlab
        self._config = config
        self._run_dir = run_dir
        self._package = importlib.import_module("swanlab")

    def begin(self, identifier: str, resumed: bool) -> None:
        known = inspect.signature(self._package.init).parameters
        # Their names, and what there is, changed with versions.
        old = "experiment_name" in known
        values = self._values
        name = values.name or self._run_dir.resolve().name
        wanted = {
            "project": values.project,
            "workspace": values.workspace,
            "experiment_name" if old else "name": name,
            "logdir" if old else "log_dir": str(self._run_dir / "swanlog"),
            "mode": "cloud" if old and values.mode == "online" else values.mode,
            "config": self._config.model_dump(mode="json"),
            "settings": self._settings(),
        }
        if "resume" in known:
            wanted.update(id=identifier, resume="allow")
        elif resumed:
            tqdm.write(
                "note: logging.swanlab: this version of swanlab cannot go on with a run; another "
                f"one of the name {name} begins"
            )
        (self._run_dir / "swanlog").mkdir(parents=True, exist_ok=True)
        self._package.init(**wanted)

    def log(self, numbers: Dict[str, float], step: int) -> None:
        self._package.log(numbers, step=step)

    def finish(self) -> None:
        self._package.finish()

    def _settings(self) -> Any:
        """What is printed stays where it is printed."""
        kind = self._package.Settings
        if "terminal" in kind.model_fields:
            return kind(terminal={"proxy_type": "none"})
        return kind(log_proxy_type="none")


_SERVICES: Dict[str, Callable[[Config, Path], Service]] = {"wandb": Wandb, "swanlab": Swanlab}


def check_loggers(config: Config) -> None:
    """Raises ConfigError for a package that is asked for and not installed."""
    for name in _wanted(config):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without origin: a folder of that name
            raise ConfigError(
                f"logging.{name}: needs the package {name}: pip install 'pangu_locmoe[{name}]'"
            )


def make_loggers(config: Config, run_dir: Path) -> List[WriteToService]:
    """Those of the configuration, not begun yet. Raises ConfigError where one cannot be imported."""
    check_loggers(config)
    loggers = []
    for name in _wanted(config):
        try:
            service = _SERVICES[name](config, run_dir)
        except Exception as error:
            raise ConfigError(
                f"logging.{name}: the package cannot be imported: {_one_line(error)}"
            ) from None
        loggers.append(WriteToService(name, service, config.train.log_every))
    return loggers


def _wanted(config: Config) -> List[str]:
    return [name for name in _SERVICES if getattr(config.logging, name) is not None]


def _identifier(run_dir: Path, name: str) -> str:
    """The id of this run, made at its first start. 21 characters: SwanLab takes no others."""
    file = run_dir / IDS_FILE
    identifiers: Dict[str, str] = {}
    with suppress(OSError, ValueError):
        identifiers = dict(json.loads(file.read_text(encoding="utf-8")))
    if name not in identifiers:
        identifiers[name] = secrets.token_hex(11)[:21]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json_text(identifiers, indent=1).encode("utf-8"))
    return identifiers[name]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
