"""`pangu-locmoe`: the verbs, from the command line to an exit code.

A LocMoEError is one line on standard error and exit code 2. What a verb needs is imported inside of
it: `--help` and `capacity` should not wait seconds for MindSpore.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import List, Optional

from pangu_locmoe import __version__, console, interrupts
from pangu_locmoe.cli import clusters, load, models, runs
from pangu_locmoe.cli.flags import Parser, Verb
from pangu_locmoe.errors import LocMoEError


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one verb and return the exit code: 0, 2 with one line for what the user can mend, 1
    for a check that failed, 128 + signal.
    """
    options = _parser().parse_args(arguments)
    verb: Verb = options.verb
    try:
        with interrupts.heard(), console.forgiving(options.writes):
            return verb(options)
    except LocMoEError as error:
        with console.forgiving():
            print(f"pangu-locmoe: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except BaseException as error:
        if not _was_interrupted(error):
            raise
        # At once, because the interpreter's end takes seconds with MindSpore and aborts if its
        # import was interrupted.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(130)


def _was_interrupted(error: Optional[BaseException]) -> bool:
    """Whether Ctrl-C is behind an error; libraries that are being imported make others of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="pangu-locmoe", description="Train and study LocMoE models with MindSpore."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for add in (*runs.VERBS, *clusters.VERBS, *models.VERBS):
        add(verbs)
    loads = verbs.add_parser(
        "load",
        help="expert load: import, states, forecast, place, report",
        description="Study the load of experts.",
        allow_abbrev=False,
    )
    of_load = loads.add_subparsers(required=True, metavar="VERB")
    for add in load.VERBS:
        add(of_load)
    return parser
