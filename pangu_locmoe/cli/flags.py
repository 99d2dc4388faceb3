"""What verbs have in common: how one is added, and the arguments that several take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Callable, NoReturn

Verb = Callable[[argparse.Namespace], int]

Verbs = Any
"""What argparse's `add_subparsers` returns; it has no public name."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists what there is\n")


def add_verb(
    verbs: Verbs, name: str, verb: Verb, text: str, writes: bool = False
) -> argparse.ArgumentParser:
    """The parser of a verb, for its arguments.

    Args:
        verbs: that it is one of.
        name: on the command line.
        verb: parsed arguments to an exit code.
        text: what it does, for the help.
        writes: its result is files, whatever becomes of what it prints.
    """
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(verb=verb, writes=writes)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG and --set."""
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG",
        help="a YAML file, for example configs/cpu_smoke.yaml",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one value, for example moe.router=switch; repeatable",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_CHECKPOINT."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="run directory (its newest checkpoint) or checkpoint folder",
    )
