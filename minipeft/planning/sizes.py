"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from minipeft.errors import ConfigError, told

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bytes_in(text: str) -> int:
    """Bytes of "24GiB", "24 GB", "800M" or "1e9"; all units count in steps of 1024, as the makers of GPUs count.

    Raises:
        ConfigError: it is something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kKmMgGtT]?)(?:i?[bB])?\s*", text)
    number = float(match[1]) * UNITS[match[2].upper()] if match else 0
    if match is None or not 1 <= number < 2**60:
        raise ConfigError(f"{told(text)} is not a size of memory; write it as 24GiB or 800MiB.")
    return int(number)


def in_units(count: int) -> str:
    """Bytes with a unit that suits them."""
    for unit in ("GiB", "MiB", "KiB"):
        size = count / UNITS[unit[0]]
        if size >= 1:
            return f"{size:,.1f} {unit}"
    return f"{count} bytes"
