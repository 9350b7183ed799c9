"""Returning freed memory to the operating system, which glibc does late or not at all."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def trim(device_type: str) -> None:
    """Return the pages of freed arrays that lie between used ones; only on a CPU with glibc.

    Arrays of tens of megabytes leave holes in glibc's heap that arrays of the same size do not fit into again, since
    torch asks for aligned ones. That makes a training step take a fifth more memory; the call takes milliseconds.
    """
    wanted = device_type == "cpu" and not torch.compiler.is_compiling()
    give_back = _of_glibc("malloc_trim") if wanted else None
    if give_back is not None:
        give_back(0)


def map_large_arrays(least: int) -> None:
    """From now on, freed arrays of `least` bytes or more go back at once; only with glibc.

    It is a setting of the process. New arrays are pages that the system must clear, which takes time, but none leaves
    a hole. By itself glibc treats arrays so only above 32 MiB.
    """
    set_option = _of_glibc("mallopt")
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, least)
        set_option(M_TRIM_THRESHOLD, least)


@functools.cache
def _of_glibc(name: str) -> Callable[..., int] | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    return getattr(ctypes.CDLL(None), name, None)
