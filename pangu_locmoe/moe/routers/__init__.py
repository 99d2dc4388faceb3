"""The routers and their registry.

A router is one class in one file of this folder, and a line in config/routers.py. Routers from
elsewhere are imported when a model that names one is built.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Type

from pangu_locmoe.config import Config, refuse
from pangu_locmoe.moe.routers.base import ROUTERS, GatedRouter, Router

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from pangu_locmoe.moe.routers import outside  # noqa: E402

__all__ = ["ROUTERS", "GatedRouter", "Router", "router_class"]


def router_class(config: Config) -> Type[Router]:
    """The class that `moe.router` names; one of the user's own is imported.

    Raises:
        ConfigError: there is no such class, or it cannot work with the configuration.
    """
    name = config.moe.router
    if name not in ROUTERS:
        try:
            outside.register(name)
        except ValueError as error:
            refuse(config, [("moe.router", str(error))])
    router = ROUTERS[name]
    refuse(config, router.broken_rules(config))
    return router
