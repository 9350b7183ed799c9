"""Which package a class is from."""

from __future__ import annotations


def is_from(cls: type, package: str) -> bool:
    """Whether a class or one that it derives from is a package's."""
    return any(base.__module__.partition(".")[0] == package for base in cls.__mro__)
