"""DoRA: the length of each row of the weight trains separately from its direction (Liu et al., 2024, arXiv:2402.09353)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available
from typing_extensions import Self

from minipeft.errors import StateError, TargetError
from minipeft.kernels import matmul
from minipeft.kernels.functional import accumulation_dtype, is_column_major
from minipeft.kernels.transformed import is_transformed
from minipeft.layers.base import LayerOps
from minipeft.methods.lora import Lora
from minipeft.methods.lora_config import LoraConfig
from minipeft.registry.registry import register_method

# Values per block of a weight: to square on a CPU, to multiply there, and on devices where each call costs more.
CACHED, MULTIPLIED, WIDENED = 2**17, 2**20, 2**24
SAMPLED = 6  # rows and columns, roughly, sampled to recognise an unchanged weight


@register_method("dora")
class Dora(Lora):
    """y = m / |W + s B A| (W + s B A) x + b, eq. (5) of arXiv:2402.09353, with |.| the norm of each row.

    `lora_magnitude_vector` m is (out,), or (1, out, 1, ...) for a convolution, at first ``|W + s B A|``, so that the model
    starts as its base; in float32 at least, since a rounded length would scale the row. The norm gets no gradient (section
    4.3), and the bias is not scaled. With dropout, as in PEFT, only what is added to W x sees ``d = dropout(x)``:
    ``y = W x + b + (c - 1) W d + c s B A d`` with ``c = m / |W + s B A|``. A row of length zero keeps c = 1.

    What adapters before it have made of the layer is scaled as well: all of y but the layer's own b.
    """

    runs_base = True
    kept: tuple[object, Tensor, Tensor] | None = None  # where the base weight lies, sampled values of it, its |W|^2

    def __init__(self, base: nn.Module, ops: LayerOps, config: LoraConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        magnitude = self._norm(ops.read_weight(base))
        positions = self.lora_B.shape[2:]  # of a convolution's kernel: PEFT's file has a shape of its own for it
        self.lora_magnitude_vector = nn.Parameter(magnitude.view(1, -1, *positions) if positions else magnitude)

    def for_tied(self, base: nn.Module, ops: LayerOps) -> Self:
        raise TargetError(
            "ensure_weight_tying with use_dora: the rows of a head are the columns of its embedding, and the lengths of "
            "both cannot be trained as one. Leave out one of the two options."
        )

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Tensor | None) -> Tensor:
        if self.drops and not self.is_embedding:
            return self.with_bias(base, ops, self._dropped(base, ops, x, y))
        y = self.low_rank(base, ops, x, y)
        c = self.scale(ops.read_weight(base))  # after the call, in which a hook such as prune's may compute the weight
        return self.with_bias(base, ops, _scaled(base, ops, y, y, c, whole=True))

    def _dropped(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Tensor | None) -> Tensor:
        own = ops.call(base, x)
        c = self.scale(ops.read_weight(base))
        x = F.dropout(x, self.drops)
        lora_A, lora_B = self.pair()
        h = ops.project_in(base, x, lora_A.to(x.dtype)) * self.factor
        low = ops.project_out(base, h, lora_B.to(x.dtype)).to(own.dtype)
        linear = ops.call(base, x) + low
        if y is not None:
            linear = linear + (y - own)  # what adapters before this one added; their input is not dropped here
        return (own if y is None else y) + _scaled(base, ops, low, linear, c, whole=False)

    def scale(self, weight: Tensor) -> Tensor:
        """``m / |W + s B A|``, shape (out,), for the canonical base weight (out, in); differentiable in m."""
        norm = self._norm(weight)
        has_length = norm > 0
        ratio = self.lora_magnitude_vector.flatten() / torch.where(has_length, norm, 1)
        return torch.where(has_length, ratio, 1)

    def _norm(self, weight: Tensor) -> Tensor:
        device = weight.device.type
        exact = torch.autocast(device, enabled=False) if is_autocast_available(device) else contextlib.nullcontext()
        with torch.no_grad(), exact:
            # Each is detached too: forward-mode differentiation does not mind no_grad.
            weight, lora_A, lora_B = (tensor.detach() for tensor in (weight, *self._matrices()))
            try:
                return row_norms(weight, lora_A, lora_B, self.factor, self._squares_of(weight))
            except NotImplementedError as error:
                raise StateError(
                    f"use_dora takes the length of each row of the weight, which {type(weight).__name__} does not give. Was the "
                    "layer quantized after adapting? Quantize the base first, then adapt it."
                ) from error

    def _squares_of(self, weight: Tensor) -> Tensor | None:
        """``|W|^2`` of each row, computed once for a weight that does not change; None if it is not kept.

        The weight is unchanged if it lies at the same address, torch has counted no write to it, and sampled values are
        the same: torch does not count writes through ``.data``. Kept on a CPU only. Elsewhere the comparison would wait
        for the device at every call, and the norm takes little time.
        """
        is_plain = type(weight) is Tensor and weight.device.type == "cpu" and weight.numel() > 0
        if is_transformed() or not is_plain:
            return None
        dtype = _norm_dtype(weight, self.lora_A, self.lora_B)
        rows, columns = (max(1, size // SAMPLED) for size in weight.shape)
        sample = weight[::rows, ::columns].clone()
        place = (weight.data_ptr(), weight._version, weight.shape, weight.dtype, dtype)
        if self.kept is None or self.kept[0] != place or not torch.equal(self.kept[1], sample):
            self.kept = (place, sample, squared_rows(weight, dtype))
        return self.kept[2]

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.merge_after(weight, bias, weight, bias)

    def merge_after(
        self, weight: Tensor, bias: Tensor | None, base_weight: Tensor, base_bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        moved = weight + Lora.delta(self, weight).to(weight.dtype)
        c = self.scale(base_weight).to(weight.dtype)
        if bias is not None and base_bias is not None:
            bias = base_bias + c * (bias - base_bias)
        return moved * c.unsqueeze(1), self.merge_bias(bias)

    def vacate(self, base: nn.Module, ops: LayerOps) -> None:
        super().vacate(base, ops)
        length = self._norm(ops.read_weight(base))
        self.lora_magnitude_vector.copy_(length.view_as(self.lora_magnitude_vector))

    def file_tensors(self) -> dict[str, Tensor]:
        return {**super().file_tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}


def row_norms(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, squares: Tensor | None = None
) -> Tensor:
    """The length of each row of ``W + s B A``, without forming that matrix.

    ``|W + s B A|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>``, row by row: no array is larger than (out, r),
    except that a half-precision weight is widened a few rows at a time.

    Args:
        weight: W, shape (out, in).
        lora_A: shape (r, in).
        lora_B: shape (out, r).
        scaling: s, dimensionless.
        squares: ``|W|^2`` of each row, shape (out,), if known.

    Returns:
        Shape (out,), in float32, or float64 if an argument is.
    """
    dtype = _norm_dtype(weight, lora_A, lora_B)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    squares = squared_rows(weight, dtype) if squares is None else squares
    update = (2 * scaling * _through(weight, A) + scaling**2 * (B @ (A @ A.t()))) * B
    return (squares + update.sum(1)).clamp_min(0).sqrt()


def _norm_dtype(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> torch.dtype:
    return torch.promote_types(accumulation_dtype(weight), torch.promote_types(lora_A.dtype, lora_B.dtype))


def squared_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``|W|^2`` of each row in this dtype, shape (out,)."""
    across = is_column_major(weight)
    if weight.dtype == dtype and not across:
        norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
        return norms.square()
    if weight.device.type == "cuda":  # which widens as it reads, and sums across as fast
        return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    squares = weight.new_zeros(len(weight), dtype=dtype)
    # In blocks contiguous in memory: summing across is 25 times slower, and a block is widened within the cache.
    for rows, _, part in _blocks(weight, CACHED):
        squares[rows] += part.to(dtype).square().sum(1)
    return squares


def _through(weight: Tensor, A: Tensor) -> Tensor:
    """``W A^T``, shape (out, r), in A's dtype."""
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm if is_transformed() else matmul.narrow
    if weight.dtype == A.dtype:
        return product(weight, A.t())
    cross = A.new_zeros(len(weight), len(A))
    for rows, columns, part in _blocks(weight, MULTIPLIED):
        cross[rows] += product(part.to(A.dtype), A[:, columns].t())
    return cross


def _blocks(weight: Tensor, values: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, part) of contiguous parts with about this many values each."""
    across = int(is_column_major(weight))
    small = weight.device.type == "cpu" and not is_transformed()
    step = max(1, (values if small else WIDENED) // max(1, weight.shape[1 - across]))
    for start in range(0, weight.shape[across], step):
        some, every = slice(start, start + step), slice(None)
        part = weight.narrow(across, start, min(step, weight.shape[across] - start))
        yield (every, some, part) if across else (some, every, part)


def _scaled(base: Any, ops: LayerOps, y: Tensor, linear: Tensor, c: Tensor, *, whole: bool) -> Tensor:
    """``y + (c - 1) (linear - b)``, where c and b are (out,), the rest has the output's shape; `whole`: y is `linear`.

    In half precision c itself would round its small difference from 1 away; in full precision it saves a pass over y.
    """
    bias = ops.read_bias(base)
    shift = None if bias is None else ops.per_feature(base, ((1 - c) * bias.to(c.dtype)).to(y.dtype))
    if whole and y.dtype.itemsize >= 4:
        c = ops.per_feature(base, c.to(y.dtype))
        return y * c if shift is None else torch.addcmul(shift, y, c)
    return torch.addcmul(y if shift is None else y + shift, linear, ops.per_feature(base, (c - 1).to(y.dtype)))
