"""Does a configuration read the example corpus? `python scripts/uses_corpus.py CONFIG [--set
KEY=VALUE]...`: exit code 0: yes; 1: no, or it cannot be read, and `train` says why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from pangu_locmoe.config import load_config
from pangu_locmoe.errors import LocMoEError

CORPUS = "data/corpus"


def uses_corpus(config: Path, overrides: List[str]) -> bool:
    """Whether a source of the configuration is in the example corpus.

    Raises:
        LocMoEError: the configuration is wrong.
    """
    sources = load_config(config, overrides).data.sources
    return any(f"{source.path}/".startswith(f"{CORPUS}/") for source in sources)


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args(arguments)
    try:
        return 0 if uses_corpus(options.config, options.set) else 1
    except LocMoEError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
