"""Methods as they are typed: `ses`, `window_mean(width=200)`."""

from __future__ import annotations

import ast
from typing import Any

from pangu_locmoe.errors import DataError


def label(name: str, options: dict[str, Any]) -> str:
    """The method with its options, as `parse` reads it."""
    inside = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name}({inside})" if inside else name


def parse(method: str) -> tuple[str, dict[str, Any]]:
    """Name and options of `name` or `name(option=value, ...)`.

    Raises DataError if it is neither.
    """
    if "(" not in method:
        return method.strip(), {}
    try:
        node = ast.parse(method.strip(), mode="eval").body
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and not node.args
            and all(word.arg for word in node.keywords)
        ):
            return node.func.id, {
                str(word.arg): ast.literal_eval(word.value) for word in node.keywords
            }
    except (SyntaxError, ValueError):
        pass
    raise DataError(
        f"method {method!r}: write a name or name(option=value), for example window_mean(width=200)"
    )
