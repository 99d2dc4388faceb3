"""The command `pangu-locmoe`."""

from pangu_locmoe.cli.verbs import main

__all__ = ["main"]
