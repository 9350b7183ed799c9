"""bitsandbytes' ``Linear4bit``: NF4 and FP4, with and without double quantization (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.errors import warn
from minipeft.layers.base import runs_only
from minipeft.layers.quantized import QuantizedLinearOps, with_bias
from minipeft.registry.registry import register_layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that it dequantizes to


@register_layer("bitsandbytes.nn.Linear4bit")
class Linear4bitOps(QuantizedLinearOps):
    """Two weights per byte, with one scale per block of 64; double quantization stores the scales in 8 bits.

    The layer's own call keeps nothing as large as a float weight: its backward pass dequantizes again.
    """

    kinds = ("nf4", "fp4")

    def accepts(self, base: Any) -> bool:
        state = _state(base)
        return state is not None and tuple(state.shape) == (base.out_features, base.in_features)

    @torch.no_grad()
    def dequantized(self, base: Any, dtype: torch.dtype | None = None) -> Tensor:
        bnb: Any = importlib.import_module("bitsandbytes.functional")
        data, state = base.weight.data, copy.copy(_state(base))
        if _has_cpu_layout(state):
            data, state = _in_usual_layout(data, state)
        # Straight to the dtype asked for: that of the layer it was made from may be narrower.
        state.dtype = dtype or state.dtype
        return bnb.dequantize_4bit(data, state)

    def calls_linear(self, base: Any, x: Tensor) -> bool:
        bnb: Any = importlib.import_module("bitsandbytes.nn")
        if not runs_only(base, bnb.Linear4bit.forward) or x.dtype not in DTYPES:
            return False
        state, device = _state(base), x.device.type
        if state is None or _has_cpu_layout(state):
            return False
        dtypes = [x.dtype, *([torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else [])]
        return not base.compute_type_is_set or base.compute_dtype in dtypes

    def quantize(self, kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        bnb: Any = importlib.import_module("bitsandbytes.nn")
        out_features, in_features = weight.shape
        blocksize = 64 if in_features % 64 == 0 else 32  # so that a block does not straddle two rows, if possible
        if not reads_back(in_features, blocksize, kind, weight.dtype, weight.device):
            raise ValueError(f"bitsandbytes misreads rows of {in_features} 4-bit weights on this processor")
        layer: nn.Module = bnb.Linear4bit(
            in_features, out_features, bias is not None, weight.dtype, quant_type=kind, device="meta"
        )
        quantized = bnb.Params4bit(weight, False, blocksize=blocksize, quant_type=kind, module=layer)
        layer.weight = quantized.to(weight.device)
        return with_bias(layer, bias)

    def transformers_config(self, kind: str, dtype: torch.dtype, in_float: Sequence[str], transposed: bool) -> Any:
        transformers: Any = importlib.import_module("transformers")
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(in_float),
        )

    def prepare(self, base: Any) -> None:
        """Keep bitsandbytes from storing the weight in another layout, and undo it if that has happened.

        On a processor with AVX512-BF16, bitsandbytes 0.49 and 0.50 do so in the first call in eval mode without gradients.
        The scales are rounded to bfloat16 and no gradient passes through that layout, so training fails after the first
        evaluation. So does the evaluation itself if a side is not a multiple of 32 or 64.
        """
        base.support_avx512bf16_for_cpu = False
        state = _state(base)
        if state is not None and not base.weight.is_meta:
            kind = (base.in_features, state.blocksize, state.quant_type, torch.float32, base.weight.device)
            if not reads_back(*kind):
                _warn_of_misreading(base.in_features, state.blocksize)
        if state is not None and _has_cpu_layout(state):
            base.weight.data, base.weight.quant_state = _in_usual_layout(base.weight.data, state)
            base.quant_state = base.weight.quant_state


@functools.lru_cache(maxsize=1024)
@torch.no_grad()
def reads_back(in_features: int, blocksize: int, quant_type: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether bitsandbytes dequantizes rows of this length to what it quantized, up to rounding to 16 values.

    On a CPU with AVX512, version 0.50 does not if a block straddles two rows of a length that is a multiple of 16: it
    uses another block's scale, in every call of such a layer.
    """
    bnb: Any = importlib.import_module("bitsandbytes.functional")
    values = torch.randn(16, in_features, generator=torch.Generator().manual_seed(0), device="cpu")
    values = (values * torch.logspace(-1, 1, 16, device="cpu")[:, None]).to(device, dtype)
    codes, state = bnb.quantize_4bit(values, blocksize=blocksize, quant_type=quant_type)
    error = (bnb.dequantize_4bit(codes, state) - values).float().abs().flatten()
    ends = -values.numel() % blocksize
    blocks, errors = (F.pad(t, (0, ends)).view(-1, blocksize).amax(1) for t in (values.float().abs().flatten(), error))
    return bool((errors <= 0.2 * blocks).all())  # half the widest gap between two codes is a sixth


@functools.lru_cache(maxsize=1024)
def _warn_of_misreading(in_features: int, blocksize: int) -> None:
    warn(
        f"bitsandbytes misreads 4-bit layers with {in_features} input features in blocks of {blocksize} on this processor: "
        "the base is not what it was quantized from, and differs from the same base on a GPU. Layers made by "
        "minipeft.quantize are read correctly."
    )


def number_of_values(parameter: Tensor) -> int:
    """How many values a parameter holds; bitsandbytes packs two of 4 bits into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def _state(base: Any) -> Any:
    """How the weight is quantized, or None if it is not quantized yet."""
    return getattr(base.weight, "quant_state", None) or base.quant_state


def _has_cpu_layout(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _in_usual_layout(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The weight in the usual layout, with exactly the same values; `state` is changed."""
    bnb: Any = importlib.import_module("bitsandbytes.functional")
    # bitsandbytes' own way back quantizes the scales again, or else leaves them transposed: a wrong weight.
    scales = state.absmax.t().reshape(-1).float()
    state.original_nested = False
    data, state = bnb._convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = scales
    return data, state
