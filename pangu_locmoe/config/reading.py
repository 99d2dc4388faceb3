"""YAML files with `base:` inheritance, and `--set a.b=c` on top."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict

import yaml

from pangu_locmoe.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML drops the first, and reads 1e-3 as a
    number, not as text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.value[index][0].start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"base = {str(path)!r}: the file is its own base")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8; a number of thousands of digits; nested too deep
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must hold sections such as `model:` and `moe:`, holds a "
            f"{type(values).__name__}"
        )
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"base = {base!r}: must be the path of another configuration file")
    return merge(read(path.parent / base, (*seen, path.resolve())), values)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        # Tables whose keys are domain names are replaced as a whole: a half of a mixture has no
        # meaning.
        merged[key] = (
            merge(merged[key], value) if both and key not in ("mixture", "group_sizes") else value
        )
    return merged


def override_value(values: dict[str, Any], override: str) -> None:
    """Set what `--set KEY=VALUE` says, in place; VALUE is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: must be KEY=VALUE, for example moe.router=switch")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--set {override!r}: the value is not YAML") from None
    set_value(values, key, value, f"--set {override!r}")


def set_value(values: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Set a key such as `moe.router`, in place; `origin` says in errors where it comes from."""
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{origin}: {parent} is a value, not a section")
        values = child
    values[last] = value
