"""What a class must fulfil to be registered: derive from its contract, be complete, and keep the parameter names."""

from __future__ import annotations

import inspect


def breach(cls: type, contract: str) -> str | None:
    """What a class breaks of the contract class that calls itself this (`LayerOps`, `Adapter`), in a sentence, or None."""
    name = getattr(cls, "__name__", repr(cls))
    root = next((base for base in getattr(cls, "__mro__", ()) if vars(base).get("contract") == contract), None)
    if root is None:
        return f"{name} does not derive from minipeft.{contract}, so it cannot be registered as one."
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    needs_one_of: tuple[str, ...] = getattr(root, "needs_one_of", ())
    if needs_one_of and all(getattr(cls, method) is getattr(root, method) for method in needs_one_of):
        missing.append(" or ".join(needs_one_of))
    if missing:
        return f"{name} lacks {', '.join(map(repr, missing))} of the {contract} contract."
    for method in contract_methods(root):
        wanted, given = (list(inspect.signature(getattr(owner, method)).parameters) for owner in (root, cls))
        if given[: len(wanted)] != wanted:
            signature = f"{name}.{method}({', '.join(given)})"
            return f"{signature} does not fit the {contract} contract: {method}({', '.join(wanted)})."
    return None


def contract_methods(root: type) -> list[str]:
    """Names of the public methods that a contract class defines, and its ``__init__``."""
    return [
        name
        for name, value in vars(root).items()
        if (isinstance(value, staticmethod | classmethod) or inspect.isfunction(value))
        and (not name.startswith("_") or name == "__init__")
    ]
