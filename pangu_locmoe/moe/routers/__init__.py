"""The routers and their registry. A router is one class in one file of this folder; putting the file here registers it.

Routers from elsewhere are registered by outside.py when a configuration names one.
"""

from __future__ import annotations

import importlib
import pkgutil

from pangu_locmoe.moe.routers.base import ROUTERS, GatedRouter, Router

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ROUTERS", "GatedRouter", "Router"]
