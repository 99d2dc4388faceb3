"""Routers of users: classes outside this package, named in the YAML as `module:Class`."""

from __future__ import annotations

import importlib
import os
import sys

from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.moe.routers.base import ROUTERS, Router


def register(name: str) -> None:
    """Import `module:Class`, from the working directory or the Python path, and register the class under that name.

    Raises:
        ValueError: there is no such module or class, or it is not a router; the message says which.
    """
    module_name, _, class_name = name.partition(":")
    # A command that is installed has its own folder on the path, not the one it is called in.
    here = os.getcwd()  # noqa: PTH109
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is run
        raise ValueError(f"{module_name or 'a module without a name'} cannot be imported: {type(error).__name__}: {error}") from None
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Router)):
        raise ValueError(f"{module_name} ({module.__file__}) has no subclass of Router named {class_name!r}")
    ROUTERS[name], ROUTER_TRAITS[name] = found, found.traits
