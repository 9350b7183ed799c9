"""Matrix products by the faster of the libraries that torch carries; the arithmetic is float32 in either.

Torch multiplies float32 matrices on a CPU with Intel's MKL, which on other makers' processors leaves the AVX-512 units
idle; oneDNN, which torch carries too, uses them, and is about twice as fast there. The rounding of the two differs in
the last bits, so this is for training, where the sums of parallel runs differ as much.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORTH_IT = 2**20  # multiplications below which preparing oneDNN costs more than it gains
CPU_INFO = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, outside autograd.

    Args:
        x: shape (..., in_features), any layout.
        weight: shape (out_features, in_features), any layout.
        bias: shape (out_features,), or None.

    Returns:
        Shape (..., out_features), contiguous, no view of anything.
    """
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
    if through_onednn(rows, weight):
        # Not a view, though it lies in the flat result: a view made here could not be written in place later.
        y: Tensor = _onednn()(rows, weight, bias, "none", [], "")
        return y.view(shape).data
    return torch_linear(x, weight, bias)


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with the kernel, and so the bits, of ``torch.nn.functional.linear``."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, flat = x.reshape(-1, x.shape[-1]), y.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=flat)
    else:
        torch.addmm(bias, rows, weight.t(), out=flat)
    return y


def narrow(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, shapes (p, q) and (q, few), outside autograd; some ways of computing it are several times slower."""
    if through_onednn(left, right.t()):
        transposed = left.stride(0) < left.stride(1)
        return linear(right.t(), left).t() if transposed else linear(left, right.t())
    # MKL is slow where the few columns do not fill a vector register.
    return torch.mm(left, right) if right.shape[1] >= 16 else torch.mm(right.t(), left.t()).t()


def through_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` of these takes oneDNN; not a weight with gaps between its rows, for which that is 1000 times slower."""
    return bool(
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.numel() * weight.shape[0] >= WORTH_IT
        and torch.backends.mkldnn.enabled
        and onednn_is_faster()
        and (weight.is_contiguous() or weight.t().is_contiguous())
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 that is not Intel's, in a torch that multiplies with MKL.

    A rule, not a measurement, so that all processes of a run decide alike.
    """
    makers = CPU_INFO.read_text() if CPU_INFO.is_file() else platform.processor()
    return (
        torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and "GenuineIntel" not in makers
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@functools.cache
def _onednn() -> Any:
    return torch.ops.mkldnn._linear_pointwise
