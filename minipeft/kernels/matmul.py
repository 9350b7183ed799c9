"""Matrix products by the faster of torch's two CPU libraries.

Torch multiplies float32 matrices on a CPU with Intel's MKL, which leaves the AVX-512 units of other makers' processors
idle. oneDNN, which torch includes too, uses them and is about twice as fast there. The two round differently in the last
bits, so this is for training, in which the sums of parallel runs differ as much.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORTH_IT = 2**20  # multiplications below which preparing oneDNN costs more than it saves
CPU_INFO = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, room: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, outside autograd.

    Args:
        x: shape (..., in_features), any layout.
        weight: shape (out_features, in_features), any layout.
        bias: shape (out_features,), or None.
        room: memory of the result's shape and dtype, contiguous; used if the library can write there.

    Returns:
        Shape (..., out_features), contiguous, not a view of anything but of `room`.
    """
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
    if through_onednn(rows, weight):
        # `.data`, since autograd would forbid writing later into a view that was made in here.
        y: Tensor = _onednn()(rows, weight, bias, "none", [], "")
        return y.view(shape).data
    return torch_linear(x, weight, bias, room=room)


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, room: Tensor | None = None) -> Tensor:
    """`linear` by the same kernel as ``torch.nn.functional.linear``, so with the same bits."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0]) if room is None else room
    rows, flat = x.reshape(-1, x.shape[-1]), y.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=flat)
    else:
        torch.addmm(bias, rows, weight.t(), out=flat)
    return y


def narrow(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, shapes (p, q) and (q, few), outside autograd, in the fastest of several ways."""
    if through_onednn(left, right.t()):
        transposed = left.stride(0) < left.stride(1)
        return linear(right.t(), left).t() if transposed else linear(left, right.t())
    # MKL is slow if the columns do not fill a vector register.
    return torch.mm(left, right) if right.shape[1] >= 16 else torch.mm(right.t(), left.t()).t()


def through_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` of these uses oneDNN; never if the weight has gaps between its rows, which is 1000 times slower."""
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
    """Whether this processor has AVX-512 and is not Intel's, and torch multiplies with MKL.

    A rule instead of a measurement, so that all processes of a run decide the same.
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
