"""Configurations that a run or a checkpoint was written with: keys that its version did not know
say what that version did.

A key that is absent has its default, which is what every version did, but for those in `BEFORE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, Mapping, Tuple

from pydantic import BaseModel

from pangu_locmoe.config import Config, parse_config
from pangu_locmoe.config.older import renewed
from pangu_locmoe.config.reading import read

Key = Tuple[str, ...]

BEFORE: Mapping[Key, Any] = {("model", "final_norm"): False, ("moe", "capacity", "max_drop"): 1.0}


def load_stored_config(file: Path) -> Config:
    """The configuration in a run directory or a checkpoint. Raises ConfigError."""
    return stored_config(read(file, ()))


def stored_config(values: dict[str, Any]) -> Config:
    """The same from the plain values of any file that keeps them."""
    values = renewed(values)
    policy = _get(values, ("moe", "capacity", "policy"))
    for key, before in BEFORE.items():
        if key[-1] == "max_drop" and policy not in ("bound", "dynamic"):
            continue  # it did nothing, and is refused
        if _get(values, key, absent := object()) is absent:
            _set(values, key, before)
    return parse_config(values)


def as_before(config: Config, stored: Config, section: str = "") -> Tuple[Config, Tuple[str, ...]]:
    """The configuration with what an older version did, where it was stored and the user's own file
    does not say.

    Args:
        config: the user's.
        stored: the run's or checkpoint's that it goes on from.
        section: only keys of this section; empty: all.

    Returns:
        the configuration, and the names of the keys that were taken over.
    """
    taken = []
    for key in _taken(config, stored, section):
        config = _updated(config, key, BEFORE[key])
        taken.append(".".join(key))
    return config, tuple(taken)


def _taken(config: Config, stored: Config, section: str) -> Iterator[Key]:
    for key, before in BEFORE.items():
        values = [_lookup(one, key) for one in (config, stored)]
        if (
            key[0].startswith(section)
            and values[1] == before != values[0]
            and not _is_given(config, key)
        ):
            yield key


def _is_given(config: BaseModel, key: Key) -> bool:
    """Whether the user's file or command line has the key."""
    if key[0] not in config.model_fields_set:
        return False
    return len(key) == 1 or _is_given(getattr(config, key[0]), key[1:])


def _lookup(config: Any, key: Key) -> Any:
    for part in key:
        config = getattr(config, part)
    return config


def _updated(config: Any, key: Key, value: Any) -> Any:
    return config.model_copy(
        update={
            key[0]: value if len(key) == 1 else _updated(getattr(config, key[0]), key[1:], value)
        }
    )


def _get(values: Any, key: Key, default: Any = None) -> Any:
    for part in key:
        if not isinstance(values, dict) or part not in values:
            return default
        values = values[part]
    return values


def _set(values: dict[str, Any], key: Key, value: Any) -> None:
    for part in key[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            return  # parse_config says what must be there
    values[key[-1]] = value
