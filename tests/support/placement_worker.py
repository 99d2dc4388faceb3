"""What msrun starts for test_moving_experts.py: two trainings, without and with moves; or one that
is killed while experts move.

msrun ... placement_worker.py train CONFIG RUN_DIR [CONFIG RUN_DIR]...
msrun ... placement_worker.py kill CONFIG RUN_DIR
"""

from __future__ import annotations

import os
import signal
import sys

from pangu_locmoe import cli
from pangu_locmoe.parallel import world


def main() -> int:
    communicator = world.join()
    world.join = lambda: communicator  # a process joins once
    from pangu_locmoe.train.step import moving

    if sys.argv[1] == "kill" and communicator.rank == 1:
        before = moving.ops.assign

        def assign(parameter, value):
            result = before(parameter, value)
            if "adam_m" in parameter.name:  # the weights have moved, their moments have not
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        moving.ops.assign = assign
    for config, run_dir in zip(sys.argv[2::2], sys.argv[3::2]):
        code = cli.main(
            ["train", config, "--run-dir", run_dir, "--resume", "auto", "--no-progress"]
        )
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
