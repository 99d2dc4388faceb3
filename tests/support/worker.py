"""One rank of a job that runs every case of its world's size: msrun ... worker.py FOLDER
everyday|all [TRAIN_ARGUMENTS...]

Writes FOLDER/rank-R.json and FOLDER/gradients-R.npz; with arguments it then runs `pangu-locmoe
train` with them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from pangu_locmoe import cli
from pangu_locmoe.parallel import world


def main() -> int:
    communicator = world.join()
    from support import cases

    folder = Path(sys.argv[1])
    started = time.time()
    ranks = communicator.size
    found = {}
    everyday = cases.EVERYDAY[ranks]
    for name in everyday if sys.argv[2] == "everyday" else cases.possible(ranks):
        began = time.time()
        cpu = time.process_time()
        run = cases.Run(cases.CASES[name], communicator)
        rows = run.rows(everyday[name] if sys.argv[2] == "everyday" else cases.CASES[name].steps)
        found[name] = {"rows": rows, "digest": run.digest()}
        print(
            (
                f"{name}: {time.time() - began:.1f} s, {time.process_time() - cpu:.1f} s of "
                "the processor"
            ),
            flush=True,
        )
    if ranks == 2:
        gradients = {}
        for name in cases.GRADIENTS:
            for weight, value in cases.reduced_gradients(cases.CASES[name], communicator).items():
                gradients[f"{name}: {weight}"] = value
        np.savez(folder / f"gradients-{communicator.rank}.npz", **gradients)
    (folder / f"rank-{communicator.rank}.json").write_text(json.dumps(found))
    print("cases", time.time() - started, flush=True)
    if len(sys.argv) == 3:
        return 0
    world.join = lambda: communicator  # a process joins once
    return cli.main(sys.argv[3:])


if __name__ == "__main__":
    raise SystemExit(main())
