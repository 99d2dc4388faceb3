"""`python -m pangu_locmoe.check CONFIG RANKS [KEY=VALUE]...`: what scripts/train_ascend.sh asks
before it starts anything.

Prints HCCL_BUFFSIZE in megabytes; stops where the configuration does not fit the number of ranks.
"""

from __future__ import annotations

import sys
from typing import List

from pangu_locmoe.check.communication import buffer_megabytes
from pangu_locmoe.config import load_config
from pangu_locmoe.errors import LocMoEError


def main(arguments: List[str]) -> int:
    path, ranks, *overrides = arguments
    try:
        print(buffer_megabytes(load_config(path, overrides), int(ranks)))
    except LocMoEError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
