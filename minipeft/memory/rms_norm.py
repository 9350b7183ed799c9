"""Transformers' RMS norms (arXiv:1910.07467) by torch's own kernel, on devices where that is a single one.

Theirs are composed of eight operations, six of them on a float32 copy. The kernel keeps its input and a number for each row.
It rounds once, where the composed one rounds twice: in half precision the two may differ by one rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEVICES = ("cuda",)  # elsewhere torch composes it of single operations as well
KERNEL = "_minipeft_kernel"  # in a norm's __dict__: that the kernel computes what it does


@dataclass(frozen=True)
class RmsNorm:
    """What a norm computes, by the kernel."""

    norm: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """The norm of each row of x, shape (..., features)."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # whose dtype the norms ignore, too
                return self.forward(x)
        weight: Tensor = self.norm.weight  # type: ignore[assignment]
        return F.rms_norm(x, weight.shape, weight, float(self.norm.variance_epsilon))  # type: ignore[arg-type]


def kernel_of(norm: nn.Module, x: Tensor) -> RmsNorm | None:
    """The kernel, if it can be used for this input."""
    if KERNEL not in norm.__dict__ or x.device.type not in DEVICES or x.dtype is not norm.weight.dtype:
        return None
    return RmsNorm(norm)


@torch.no_grad()
def is_plain(norm: nn.Module) -> bool:
    """Whether a norm computes what the kernel does: tried with small values, for which the epsilon counts."""
    weight, epsilon = norm._parameters.get("weight"), vars(norm).get("variance_epsilon")
    if weight is None or weight.is_meta or weight.ndim != 1 or not isinstance(epsilon, float):
        return False
    x = torch.linspace(-1e-3, 2e-3, 2 * len(weight), device=weight.device, dtype=torch.float32).view(2, -1)
    wanted = F.rms_norm(x, weight.shape, weight.float(), epsilon)
    return torch.allclose(type(norm).forward(norm, x).float(), wanted, rtol=1e-4, atol=1e-6)
