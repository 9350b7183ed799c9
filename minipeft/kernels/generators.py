"""Torch's random generators, put back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Afterwards the CPU's generator and, once CUDA is in use, those of its devices are what they were.

    `torch.random.fork_rng` on its own starts CUDA, and warns if there are several devices.
    """
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if used else ()):
        yield
