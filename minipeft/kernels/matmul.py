"""Matrix products in the fastest way that torch has on this CPU.

Torch multiplies float32 matrices on a CPU with Intel's MKL, which leaves the AVX-512 units of other makers' processors
idle. oneDNN, which torch includes too, uses them and is about twice as fast there. In bfloat16 and float16, torch multiplies
number by number on a processor without instructions for them, 5 to 40 times slower than in float32: there, the product is
made in float32, a block at a time, and rounded once. All of these differ in the last bits, so this is for training, in which
the sums of parallel runs differ as much.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORTH_IT = 2**20  # multiplications below which preparing oneDNN costs more than it saves
CPU_INFO = Path("/proc/cpuinfo")
HALF = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}  # who knows of kernels
BLOCK = 2**21  # numbers of each factor that exist in float32 at a time


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
    if torch_suffices(x, weight.shape[0]):
        return torch_linear(x, weight, bias, room=room)
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
    if through_onednn(rows, weight):
        # `.data`, since autograd would forbid writing later into a view that was made in here.
        y: Tensor = _onednn()(rows, weight, bias, "none", [], "")
        return y.view(shape).data
    if through_float32(rows, weight):
        y = x.new_empty(len(rows), len(weight)) if room is None else room
        return in_float32(rows, weight, bias, y.view(-1, len(weight))).view(shape)
    return torch_linear(x, weight, bias, room=room)


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, room: Tensor | None = None) -> Tensor:
    """`linear` by the same kernel as ``torch.nn.functional.linear`` of what is to be differentiated, so with the same bits."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if room is None:
        y = F.linear(rows, weight, bias)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0]).data  # as above
    flat = room.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=flat)
    else:
        torch.addmm(bias, rows, weight.t(), out=flat)
    return room


def torch_suffices(x: Tensor, out_features: int) -> bool:
    """Whether torch's own product is certainly the fastest: the tensors are not on a CPU, or are small."""
    return not x.is_cpu or x.numel() * out_features < WORTH_IT


def times(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, shapes (p, q) and (q, r), outside autograd."""
    return torch.mm(left, right) if torch_suffices(left, right.shape[1]) else linear(left, right.t())


def narrow(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, shapes (p, q) and (q, few), outside autograd, in the fastest of several ways."""
    if torch_suffices(left, right.shape[1]):
        return torch.mm(left, right)
    if beats_torch(left, right.t()):
        transposed = left.stride(0) < left.stride(1)
        return linear(right.t(), left).t() if transposed else linear(left, right.t())
    return torch_narrow(left, right)


def torch_narrow(left: Tensor, right: Tensor) -> Tensor:
    """`narrow` by torch's own product, differentiable: MKL is slow if the columns do not fill a vector register."""
    fills = right.shape[1] >= 16 or torch_suffices(left, right.shape[1])
    return torch.mm(left, right) if fills else torch.mm(right.t(), left.t()).t()


def scaled(left: Tensor, right: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """``alpha * left @ right`` in this dtype, contiguous, outside autograd; the result has few rows or few columns."""
    if not left.is_cpu:  # as few calls as can be: each takes longer there than so small an array
        if keeps_sums(left, dtype):
            sums = torch.mm(left, right, out_dtype=dtype)
            return sums if alpha == 1 else sums.mul_(alpha)
        return left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=alpha).to(dtype)
    if torch_suffices(left, right.shape[1]):
        product = torch.mm(left, right)
    else:
        turned = len(left) < right.shape[1]
        product = narrow(right.t(), left.t()).t() if turned else narrow(left, right)
    product = product if alpha == 1 else product.mul_(alpha)
    return (product if product.dtype is dtype else product.to(dtype)).contiguous()


def keeps_sums(left: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of half precision can be had in float32, in which a GPU sums it, instead of being rounded."""
    return left.is_cuda and torch.version.hip is None and left.dtype in HALF and dtype is torch.float32


def add_product(y: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """``y += alpha * left @ right`` in place, shapes (p, q), (p, few) and (few, q), outside autograd."""
    if torch_suffices(left, right.shape[1]) or not through_float32(left, right.t()):
        return y.addmm_(left, right, alpha=alpha)
    size, wide = max(128, BLOCK // max(1, y.shape[1])), right.float()
    for start in range(0, len(y), size):
        some = slice(start, start + size)
        y[some] = torch.addmm(y[some].float(), left[some].float(), wide, alpha=alpha)
    return y


def outer(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, shapes (p, few) and (few, q), outside autograd."""
    return linear(left, right.t()) if through_float32(left, right.t()) else torch.mm(left, right)


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm``, by way of float32 where that is faster; differentiable."""
    if not through_float32(left, right.mT[0]):
        return torch.bmm(left, right)
    return torch.bmm(left.float(), right.float()).to(left.dtype)


def add_bmm(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``y += bmm(left, right)`` in place, outside autograd."""
    if not through_float32(left, right.mT[0]):
        return y.baddbmm_(left, right)
    return y.copy_(torch.baddbmm(y.float(), left.float(), right.float()))


def in_float32(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Write ``x @ weight.T + bias``, shape (rows, out), into y. Only blocks of x and the weight are made float32.

    Each number is rounded once, to the weight's dtype, even if y is in float32.
    """
    wide = len(weight) < weight.shape[1]
    return (_in_blocks_of_terms if wide else _in_blocks_of_columns)(x, weight, bias, y)


def _in_blocks_of_columns(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """A block of the weight becomes float32 once."""
    size = max(128, BLOCK // max(1, x.shape[1]))
    for start in range(0, len(weight), size):
        columns = slice(start, start + size)
        factor = weight[columns].float().t()
        added = None if bias is None else bias[columns].float()
        for some in (slice(row, row + size) for row in range(0, len(x), size)):
            part = x[some].float()
            made = part @ factor if added is None else torch.addmm(added, part, factor)
            y[some, columns] = made.to(weight.dtype)
    return y


def _in_blocks_of_terms(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """For weights with few rows: each of their blocks adds to the whole of a block of the result."""
    size = max(128, BLOCK // max(1, len(weight)))
    for some in (slice(row, row + size) for row in range(0, len(x), size)):
        part = x[some]
        total = x.new_zeros(len(part), len(weight), dtype=torch.float32)
        if bias is not None:
            total += bias
        for terms in (slice(start, start + size) for start in range(0, x.shape[1], size)):
            total.addmm_(part[:, terms].float(), weight[:, terms].float().t())
        y[some] = total.to(weight.dtype)
    return y


def beats_torch(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` of these is faster than ``torch.nn.functional.linear``."""
    return through_onednn(x, weight) or through_float32(x, weight)


def may_beat_torch() -> bool:
    """Whether there are tensors for which `beats_torch` holds on this processor."""
    return onednn_is_faster() or not all(map(has_kernels, HALF))


def through_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` of these is made in float32."""
    return x.device.type == "cpu" and x.numel() * weight.shape[0] >= WORTH_IT and not has_kernels(x.dtype)


@functools.cache
def has_kernels(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions that multiply matrices of this dtype, as oneDNN says."""
    ask = HALF.get(dtype)
    return ask is None or not hasattr(torch.ops.mkldnn, ask) or bool(getattr(torch.ops.mkldnn, ask)())


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
