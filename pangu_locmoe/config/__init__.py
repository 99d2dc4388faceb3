"""The configuration of a run: read, checked, frozen.

A file may name another one with `base: PATH` (relative to itself); its own keys win. `--set a.b=c`
wins over both. Anything that is not known, not of the right type or not possible stops here with a
ConfigError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pangu_locmoe.config.explain import explain
from pangu_locmoe.config.models import (
    CapacityConfig,
    Config,
    CutFromConfig,
    DataConfig,
    ModelConfig,
    SampleConfig,
    SourceConfig,
    TokenChoiceConfig,
    TrainConfig,
)
from pangu_locmoe.config.reading import override_value, read, set_value
from pangu_locmoe.config.routers import with_node_groups
from pangu_locmoe.config.rules import broken_rules, doubtful_settings
from pangu_locmoe.errors import ConfigError

__all__ = [
    "CapacityConfig",
    "Config",
    "CutFromConfig",
    "DataConfig",
    "ModelConfig",
    "SampleConfig",
    "SourceConfig",
    "TokenChoiceConfig",
    "TrainConfig",
    "doubtful_settings",
    "json_schema",
    "load_config",
    "parse_config",
    "refuse",
]


def load_config(
    path: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
    completed: Callable[[Config], Sequence[str]] | None = None,
) -> Config:
    """Read a YAML file, its bases and what is set on top.

    Args:
        path: the file.
        overrides: as on the command line, ["moe.router=switch"], or from Python,
            {"moe.router": "switch"}.
        completed: further overrides, from what was read: values of the right type, which may not
            fit each other yet.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    values = read(Path(path), ())
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            set_value(values, key, value, f"{key} = {value!r}")
    else:
        for override in overrides or []:
            override_value(values, override)
    for override in completed(_typed(values)) if completed else []:
        override_value(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Validate plain nested values. Raises ConfigError with one line per problem."""
    config = with_node_groups(_typed(values))
    refuse(config, broken_rules(config))
    return config


def refuse(config: Config, problems: Iterable[tuple[str, str]]) -> None:
    """Raise a ConfigError with a line for each (key, rule) that is broken, if there are any."""
    lines = [f"{key} = {_lookup(config, key)!r}: {rule}" for key, rule in problems]
    if lines:
        raise ConfigError("\n".join(lines))


def _typed(values: dict[str, Any]) -> Config:
    """Keys and types are right; whether the values fit each other is not known."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error.errors()))) from None


def json_schema() -> str:
    """The JSON schema of a configuration file, for editors."""
    schema = Config.model_json_schema()
    schema["properties"]["base"] = {
        "type": "string",
        "description": "another file whose values this one starts from",
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config
