"""Routers of users: classes outside this package, named in the YAML as `module:Class`."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys

from pangu_locmoe.config.routers import ROUTER_TRAITS
from pangu_locmoe.moe.routers.base import ROUTERS, Router


def register(name: str) -> None:
    """Import `module:Class`, from the working directory or the Python path, and register the class
    under that name.

    Raises:
        ValueError: there is no such module or class, or it is not a router; the message says which.
    """
    module_name, _, class_name = name.partition(":")
    # A command that is installed has its own folder on the path, not the one it is called in.
    here = os.getcwd()  # noqa: PTH109
    if here not in sys.path:
        sys.path.insert(0, here)
    printed = io.StringIO()
    try:
        # Standard output may be what a command is for, such as JSON.
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            module = importlib.import_module(module_name)
            found = getattr(module, class_name, None)
    except BaseException as error:  # whatever the module does when it is run, sys.exit among it
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{module_name or 'a module without a name'} cannot be imported: {said}"
        ) from None
    sys.stderr.write(printed.getvalue())
    if not (isinstance(found, type) and issubclass(found, Router)):
        file = getattr(module, "__file__", None)
        raise ValueError(
            f"{module_name} ({file or 'which has no file'}) has no subclass of Router "
            f"named {class_name!r}"
        )
    ROUTERS[name], ROUTER_TRAITS[name] = found, found.traits
