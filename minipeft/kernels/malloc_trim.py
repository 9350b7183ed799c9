"""Returning freed memory to the operating system, which glibc does not do by itself."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable

import torch


def trim(device_type: str) -> None:
    """Return the pages of freed arrays that lie between used ones; only on a CPU with glibc.

    Arrays of tens of megabytes leave holes in glibc's heap that arrays of the same size do not fit into again, since
    torch asks for aligned ones. That makes a training step take a fifth more memory; the call takes milliseconds.
    """
    wanted = device_type == "cpu" and not torch.compiler.is_compiling()
    give_back = _malloc_trim() if wanted else None
    if give_back is not None:
        give_back(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
