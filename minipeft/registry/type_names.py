"""Types by their dotted names, which keep heavy packages from being imported."""

from __future__ import annotations

import sys


def qualified(cls: type) -> str:
    """``module.qualname``: the identity of a class, the same after a notebook reload."""
    return f"{cls.__module__}.{cls.__qualname__}"


def settled(name: str) -> str:
    """The class's own name for an alias such as ``torch.nn.Linear``, once its package is loaded; until then the alias."""
    module, _, attribute = name.rpartition(".")
    target = getattr(sys.modules.get(module), attribute, None)
    return qualified(target) if isinstance(target, type) else name
