"""The errors a user can act on. The command line prints one line for each and exits with code 2."""

from __future__ import annotations


class LocMoEError(Exception):
    """Base of every error that names what the user can change."""


class ConfigError(LocMoEError):
    """A key, a value or a combination in the configuration is not allowed."""


class DataError(LocMoEError):
    """A corpus, a tokenizer or a prepared data set is missing or unusable."""


class CheckpointError(LocMoEError):
    """A checkpoint is missing, truncated, cannot be written, or belongs to another model."""


class TopologyError(LocMoEError):
    """Experts, groups and nodes do not fit each other."""


class DivergenceError(LocMoEError):
    """The loss became NaN or infinite; the message names the step, the layer and the last good
    checkpoint.
    """


class DryRunError(LocMoEError):
    """A dry run of an Ascend step cannot be made on this machine."""


def one_line(error: BaseException) -> str:
    """What another library says, on one line and no longer than one; its kind if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
