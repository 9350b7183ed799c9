"""Sums and products in the dtype of their factors, whatever the caller computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

DEVICES = ("cpu", "cuda", "mps", "xpu")
# Who may round the factors of a float32 product first, to TensorFloat-32 or bfloat16. Torch's older flags set these too.
_LIBRARIES: Any = torch.backends
BACKENDS = (_LIBRARIES.cuda.matmul, _LIBRARIES.cudnn.conv, _LIBRARIES.mkldnn.matmul)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within the context, or the decorated function, neither ``torch.autocast`` nor TensorFloat-32 rounds what is multiplied."""
    with contextlib.ExitStack() as off:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                off.enter_context(torch.autocast(device, enabled=False))
        for backend in BACKENDS:
            if (before := backend.fp32_precision) not in ("ieee", "none"):
                off.callback(_set_back, backend, before)
                backend.fp32_precision = "ieee"
        yield


def _set_back(backend: Any, before: str) -> None:
    backend.fp32_precision = "none"  # then it follows torch.backends.fp32_precision, as it may have before
    if backend.fp32_precision != before:
        backend.fp32_precision = before
