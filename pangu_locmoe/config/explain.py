"""What is wrong with a value, in one line: key, value, what is allowed, the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Dict, List, Type, Union, get_args, get_origin

from pydantic import BaseModel

from pangu_locmoe.config.models import Config
from pangu_locmoe.config.older import replacement


def explain(items: Sequence[Any]) -> Iterator[str]:
    """One line for each key: its value, what is allowed, the nearest valid key."""
    by_key: Dict[str, List[Any]] = {}
    for item in items:
        by_key.setdefault(".".join(map(str, _key(item["loc"]))), []).append(item)
    for key, group in by_key.items():
        first = group[0]
        if first["type"] == "extra_forbidden":
            advice = replacement(key, first["input"]) or f"unknown key; {_hint(first['loc'])}"
            yield f"{key} = {first['input']!r}: {advice}"
        elif first["type"] == "missing":
            yield f"{key}: required, but not given"
        elif first["type"] == "invalid_key":
            yield (
                f"{key}: a key must be text, not the {type(first['input']).__name__} "
                f"{first['input']!r}"
            )
        else:
            yield (
                f"{key} = {first['input']!r}: must be "
                f"{', or '.join(_allowed(item) for item in group)}"
            )


def _key(location: tuple[Any, ...]) -> tuple[Any, ...]:
    """The place without what pydantic appends: the member of a Union it tried, or a note that a
    table's key is wrong.
    """
    annotation = _annotation(location[:-1])
    members = [member for member in get_args(annotation) if member is not type(None)]
    is_union = get_origin(annotation) is Union and len(members) > 1
    return location[:-1] if is_union or location[-1] == "[key]" else location


def _allowed(item: Any) -> str:
    if item["type"] in ("model_type", "dict_type"):
        return "a section of `key: value` lines"
    if item["type"] == "string_too_short":
        return f"text of at least {item['ctx']['min_length']} character"
    if item["type"] == "string_too_long":
        return f"text of at most {item['ctx']['max_length']} characters"
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return (
        message.replace("a valid string", "text")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
    )


def _hint(location: tuple[Any, ...]) -> str:
    """The nearest valid key: in the same section, else a key of that name elsewhere, else all
    keys of the section.
    """
    *section, name = map(str, location)
    known = list(_annotation(location[:-1]).model_fields)
    elsewhere = [key for key in _all_keys() if key.rpartition(".")[2] == name]
    nested = [key for key in _all_keys() if "." in key]
    nearest = (
        difflib.get_close_matches(name, known, n=1)
        or elsewhere
        or difflib.get_close_matches(name, known + nested, n=1, cutoff=0.5)
    )
    if not nearest:
        return f"known here: {', '.join(known)}"
    return (
        f"did you mean {'.'.join([*section, nearest[0]]) if nearest[0] in known else nearest[0]}?"
    )


def _annotation(location: tuple[Any, ...]) -> Any:
    """The type at a place: a section's class, or the annotation of a value or a table."""
    annotation: Any = Config
    for part in location:
        if (
            isinstance(annotation, type)
            and issubclass(annotation, BaseModel)
            and part in annotation.model_fields
        ):
            annotation = _section(annotation.model_fields[part].annotation)
        elif get_origin(annotation) is list:
            annotation = get_args(annotation)[0]
        else:
            return None
    return annotation


def _all_keys(model: Type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section(field.annotation)
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from _all_keys(section, f"{prefix}{name}.")


def _section(annotation: Any) -> Any:
    """A section that may be null is a section."""
    members = [member for member in get_args(annotation) if member is not type(None)]
    if len(members) == 1 and isinstance(members[0], type) and issubclass(members[0], BaseModel):
        return annotation if get_origin(annotation) is list else members[0]
    return annotation
