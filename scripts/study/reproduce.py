"""What reproduce.sh runs: measures what is missing, one process for each case, and writes the
table of the papers' claims.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from study.experiment import Case, Experiment, record, still_to_measure
from study.page import ALL, write_page
from study.recorded import Recorded

COMMITTED = Path("docs/results")
QUICK = Path("runs/reproduce-quick")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="append", default=[], choices=[one.name for one in ALL])
    parser.add_argument("--only", action="append", default=[], choices=[one.name for one in ALL])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--case", nargs=3, metavar=("NAME", "CASE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, case, file = options.case
        Path(file).write_text(
            json.dumps(_experiment(name).measure(json.loads(case))), encoding="utf-8"
        )
        return 0
    raw = QUICK if options.quick else COMMITTED
    page = raw / "results.md" if options.quick else COMMITTED.parent / "results.md"
    if not options.table:
        for one in ALL:
            if options.only and one.name not in options.only:
                continue
            if isinstance(one, Recorded):
                _run_script(one, one.name in options.again, options.quick)
            else:
                _measure(one, raw / f"{one.name}.json", one.name in options.again, options.quick)
                write_page(page, raw, COMMITTED, options.quick)
    write_page(page, raw, COMMITTED, options.quick)
    print(page)
    return 0


def _experiment(name: str) -> Experiment:
    return next(one for one in ALL if isinstance(one, Experiment) and one.name == name)


def _measure(experiment: Experiment, file: Path, again: bool, quick: bool) -> None:
    """Every case that is missing; with `again`, every case."""
    todo = experiment.cases(quick) if again else still_to_measure(experiment, file, quick)
    for number, case in enumerate(todo, 1):
        started = time.monotonic()
        result = _in_a_process(experiment.name, case)
        seconds = time.monotonic() - started
        record(experiment, file, quick, case, result, seconds)
        settings = ", ".join(
            f"{key} {value}" for key, value in case.items() if key not in ("set", "config")
        )
        print(
            (
                f"{time.strftime('%H:%M:%S')} {experiment.name} {number} of {len(todo)}: "
                f"{settings} ({seconds:.0f} s)"
            ),
            flush=True,
        )


def _in_a_process(name: str, case: Case) -> object:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        log = Path(folder) / "log"
        with log.open("w", encoding="utf-8") as output:
            command = [sys.executable, __file__, "--case", name, json.dumps(case), str(file)]
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            print("\n".join(log.read_text(encoding="utf-8").splitlines()[-20:]), file=sys.stderr)
            raise SystemExit(
                f"reproduce: {name} {json.dumps(case)}: exit code {code}; what is measured "
                "is kept, call again to continue"
            )
        result: object = json.loads(file.read_text(encoding="utf-8"))
        return result


def _run_script(one: Recorded, again: bool, quick: bool) -> None:
    """The script that records these numbers, where they are missing or wanted anew.

    Never for the quick table: it takes hours.
    """
    missing = [name for name in one.files if not (COMMITTED / name).exists()]
    if quick or not (missing or again):
        return
    # A folder of its own: the scripts do not run again what they find finished.
    command = [
        *one.command,
        "--output",
        f"runs/reproduce/{one.name}" + time.strftime("-%Y%m%d-%H%M%S") * again,
    ]
    print(f"{time.strftime('%H:%M:%S')} {' '.join(command)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"reproduce: {' '.join(command)}: exit code {code}")


if __name__ == "__main__":
    sys.exit(main())
