"""bitsandbytes' ``Linear4bit``: NF4 and FP4, with and without double quantisation (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor

from minipeft.layers.quantised import QuantizedLinearOps
from minipeft.registry import register_layer


@register_layer("bitsandbytes.nn.Linear4bit")
class Linear4bitOps(QuantizedLinearOps):
    """Two weights a byte, with a scale for each block of 64, which double quantisation stores in 8 bits.

    The layer's own call keeps nothing of the size of a float weight: its backward pass dequantises again.
    """

    @staticmethod
    def accepts(base: Any) -> bool:
        state = _state(base)
        return state is not None and tuple(state.shape) == (base.out_features, base.in_features)

    @staticmethod
    @torch.no_grad()
    def dequantized(base: Any) -> Tensor:
        bnb: Any = importlib.import_module("bitsandbytes.functional")
        data, state = base.weight.data, _state(base)
        if _is_repacked(state):
            data, state = _unpacked(data, copy.copy(state))
        weight: Tensor = bnb.dequantize_4bit(data, state)
        return weight

    @staticmethod
    def prepare(base: Any) -> None:
        """Keep bitsandbytes from repacking the weight, and take it back where that has happened.

        On a processor with AVX512-BF16, bitsandbytes 0.49 and 0.50 store the weight anew in the first call in eval mode
        that wants no gradient: with scales rounded to bfloat16, in a layout through which no gradient passes, so that
        training fails after the first evaluation (and so does the evaluation itself where a side is no multiple of 32
        or 64).
        """
        base.support_avx512bf16_for_cpu = False
        state = _state(base)
        if state is not None and _is_repacked(state):
            base.weight.data, base.weight.quant_state = _unpacked(base.weight.data, state)
            base.quant_state = base.weight.quant_state


def _state(base: Any) -> Any:
    """How the weight is packed, or None of a weight that is not packed yet."""
    return getattr(base.weight, "quant_state", None) or base.quant_state


def _is_repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The usual layout of a repacked weight, with exactly the values that it has; `state` is changed."""
    bnb: Any = importlib.import_module("bitsandbytes.functional")
    # Its own way back quantises the scales anew if they were, and else leaves them transposed: a wrong weight.
    scales = state.absmax.t().reshape(-1).float()
    state.original_nested = False
    data, state = bnb._convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = scales
    return data, state
