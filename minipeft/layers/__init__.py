"""Layer types, one file each; every module in this package registers itself when the package is imported."""

from __future__ import annotations

import importlib
import pkgutil

from minipeft.layers.base import LayerOps

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["LayerOps"]
