"""The process of one rank of a dry run: what is in its environment, and what it leaves behind.

A process of its own, because MindSpore reads all of it when it is loaded, and a function that should
not do nothing may end it with a signal.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Dict

from pangu_locmoe.check.dry_run.libraries import CHIP_VARIABLE, DEFAULT_CHIP
from pangu_locmoe.config import Config

LOG = "log.txt"
RESULT = "result.json"
PACKAGE_ROOT = Path(__file__).resolve().parents[3]
# Of the parent's variables none may decide anything here.
_FOREIGN = ("MS_", "GLOG_", "ASCEND_", "HCCL_", "RANK_", "LOCMOE_DRY_RUN")


def run_rank(
    config: Config, num_ranks: int, rank: int, libraries: Path, chip: str, folder: Path
) -> int:
    """Compile the rank's step and walk through it, in an empty folder.

    Args:
        config: the run.
        num_ranks: of the job; nobody else is started, and no scheduler.
        rank: which one.
        libraries: of `libraries.ready`.
        chip: its name as CANN has it, such as Ascend910B2.
        folder: gets `LOG`, `RESULT` unless the step failed, and MindSpore's order of execution.

    Returns:
        the exit code, negative for a signal.
    """
    values = {"config": config.model_dump(mode="json"), "ranks": num_ranks, "rank": rank}
    request = folder / "request.json"
    request.write_text(json.dumps(values), encoding="utf-8")
    work = folder / "work"  # MindSpore leaves files where it runs
    work.mkdir()
    module = "pangu_locmoe.check.dry_run.step"
    paths = [str(request), str(folder / RESULT)]
    with (folder / LOG).open("w", encoding="utf-8") as stream:
        return subprocess.run(
            [sys.executable, "-X", "faulthandler", "-m", module, *paths],
            cwd=work,
            env=_environment(libraries, num_ranks, rank, chip, folder),
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=deep_stack,
        ).returncode


def deep_stack() -> None:
    """MindSpore's recursion grows with the number of parameters."""
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (most, most))


def _environment(
    libraries: Path, num_ranks: int, rank: int, chip: str, folder: Path
) -> Dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    installation = libraries / "latest"

    def before(name: str, *paths: Path) -> None:
        given = filter(None, (*map(str, paths), variables.get(name)))
        variables[name] = os.pathsep.join(given)

    before("PYTHONPATH", libraries / "python", PACKAGE_ROOT)
    before("LD_LIBRARY_PATH", installation / "lib64")
    variables.update(
        ASCEND_HOME_PATH=str(installation),
        ASCEND_OPP_PATH=str(installation / "opp"),
        RANK_SIZE=str(num_ranks),
        RANK_ID=str(rank),
        # Compile, plan memory and walk through the launches, but launch nothing.
        MS_SIMULATION_LEVEL="1",
        # Which kernels are selected is in the log of one module.
        GLOG_v="2",
        MS_SUBMODULE_LOG_v="{DEVICE:1}",
        # Of all that this saves only the order of execution is wanted, which no pass is needed for.
        MS_DEV_SAVE_GRAPHS="1",
        MS_DEV_SAVE_GRAPHS_PATH=str(folder / "graphs"),
        MS_DEV_DUMP_IR_PASSES="(none)",
    )
    variables[CHIP_VARIABLE] = chip or DEFAULT_CHIP
    return variables
