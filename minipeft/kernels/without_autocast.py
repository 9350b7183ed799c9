"""Sums and products in the dtype of their factors, whatever the caller computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Within the context, or the decorated function, ``torch.autocast`` does nothing, though a caller has switched it on."""
    with contextlib.ExitStack() as off:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                off.enter_context(torch.autocast(device, enabled=False))
        yield
