"""One adapted layer, forward and backward, next to the frozen layer and PEFT's: a part of speed.py."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from options import Options, quietly, refused
from rows import Rows, compare
from subjects import CORE, FROZEN, PEFT
from timing import milliseconds
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import minipeft
from minipeft.kernels import matmul

FROZEN_FAST = "frozen layer, same products"
CALL_MS = 10.0  # a timed region is at least this long
ALPHA = 16


@dataclass(frozen=True)
class LayerCase:
    kind: str
    in_features: int
    out_features: int
    rows: int
    r: int
    dropout: float

    def __str__(self) -> str:
        shape = f"{self.kind} {self.in_features}x{self.out_features}"
        return f"{shape}, m={self.rows}, r={self.r}, dropout {self.dropout:g}"

    def base(self) -> nn.Module:
        if self.kind == "Conv1D":
            return Conv1D(self.out_features, self.in_features)
        return nn.Linear(self.in_features, self.out_features)


def layer_cases(options: Options) -> Iterator[LayerCase]:
    shapes = [("Conv1D", 768, 2304), ("Conv1D", 768, 3072), ("Linear", 2048, 2048)]
    every = (1, 16, 128, 512, 1024, 2048, 4096, 8192)
    if options.quick:
        shapes, every = [("Conv1D", 48, 96), ("Linear", 64, 64)], (16, 512)
    elif options.device == "cuda" and options.dtype is torch.bfloat16:
        shapes += [("Linear", 4096, 4096), ("Linear", 4096, 11008)]
    for shape in shapes:
        for rows in every:
            ranks = (8,) if options.quick else (8, 16, 32, 64) if 512 <= rows <= 4096 else (8, 64)
            yield from (LayerCase(*shape, rows, r, 0.0) for r in ranks)
            if rows in (512, 2048, 4096):
                yield from (LayerCase(*shape, rows, r, 0.1) for r in ranks if r != 32)


class _SameProducts(torch.autograd.Function):
    """The frozen layer with the matrix library that ours uses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return matmul.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return matmul.linear(dy, weight.t()), None, None


class SameProducts(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight
        return _SameProducts.apply(x, weight.t() if isinstance(self.base, Conv1D) else weight, self.base.bias)


def layers(case: LayerCase, options: Options) -> dict[str, nn.Module]:
    """The same layer frozen, frozen with our matrix library, and adapted by either library with the same factors."""
    torch.manual_seed(0)
    base = options.place(case.base()).requires_grad_(False)
    shared: dict[str, Any] = {"r": case.r, "lora_alpha": ALPHA, "lora_dropout": case.dropout}
    shared |= {"target_modules": ["layer"], "init_lora_weights": False}
    adapted: dict[str, nn.Module] = {}
    for name, config, adapt in (
        (PEFT, peft.LoraConfig(**shared, fan_in_fan_out=case.kind == "Conv1D"), peft.get_peft_model),
        (CORE, minipeft.LoraConfig(**shared), minipeft.get_lora_model),
    ):
        model = nn.Sequential(OrderedDict(layer=copy.deepcopy(base)))
        adapted[name] = adapt(model, config).get_submodule("base_model.model.layer" if name == PEFT else "layer")
    with torch.no_grad():
        for copied, original in zip(factors(adapted[CORE]), factors(adapted[PEFT]), strict=True):
            copied.copy_(original)
    return {FROZEN: base, FROZEN_FAST: SameProducts(base), **adapted}


def factors(layer: nn.Module) -> list[nn.Parameter]:
    """A and B, in this order in both libraries; none of a frozen layer."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def naive(base: nn.Module, A: Tensor, B: Tensor, scaling: float, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, dA and dB by the formulas of a LoRA layer, in float64."""
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    W, b, A, B, x, dy = (tensor.detach().double() for tensor in (weight, base.bias, A, B, x, dy))
    x, dy = x[0], dy[0]
    h, g = x @ A.t(), scaling * (dy @ B)
    return [x @ W.t() + b + scaling * (h @ B.t()), dy @ W + g @ A, g.t() @ x, scaling * (dy.t() @ h)]


def check_layers(case: LayerCase, subjects: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    """Outputs and gradients of ours must be as near to the truth as PEFT's; without dropout, whose masks differ."""
    reference = naive(subjects[FROZEN], *factors(subjects[PEFT]), ALPHA / case.r, x, dy)
    errors = {}
    for name in (PEFT, CORE):
        layer = subjects[name].eval()
        y = layer(x)
        values = [y, *torch.autograd.grad(y, [x, *factors(layer)], dy)]
        layer.train()
        errors[name] = [
            float((value.detach().double().view(true.shape) - true).norm() / true.norm())
            for value, true in zip(values, reference, strict=True)
        ]
    for tensor, ours, theirs in zip(("y", "dx", "dA", "dB"), errors[CORE], errors[PEFT], strict=True):
        if ours > 1.5 * theirs + 4 * torch.finfo(x.dtype).eps:
            raise SystemExit(f"{case}: {tensor} is off by {ours:.2e}, PEFT's by {theirs:.2e}; no time is reported")


def measure_layer(case: LayerCase, options: Options) -> Rows | None:
    subjects = layers(case, options)
    x = torch.randn(1, case.rows, case.in_features).to(options.device, options.dtype).requires_grad_()
    dy = torch.randn(1, case.rows, case.out_features).to(options.device, options.dtype)
    check_layers(case, subjects, x, dy)

    def call(layer: nn.Module) -> Callable[[], Any]:
        inputs = [x, *factors(layer)]
        return lambda: torch.autograd.grad(layer(x), inputs, dy)

    calls = {name: call(layer) for name, layer in subjects.items()}
    once = min(milliseconds(calls[FROZEN], options.device) for _ in range(3))
    repeats = 1 if options.quick else min(50, math.ceil(CALL_MS / once))
    times = options.race(calls, options.rounds_or(30), FROZEN, warm_ups=3, repeats=repeats)
    return None if times is None else layer_rows(str(case), times)


def layer_rows(case: str, times: dict[str, list[float]]) -> Rows:
    def beyond(name: str, base: str) -> list[float]:
        return [a - b for a, b in zip(times[name], times[base], strict=True)]

    theirs = beyond(PEFT, FROZEN)
    return [
        compare("speed_layer", case, "overhead over the frozen layer", "ms", beyond(CORE, FROZEN), theirs, PEFT),
        compare("speed_layer", case, "overhead, same products", "ms", beyond(CORE, FROZEN_FAST), theirs, PEFT),
        compare("speed_layer", case, "whole layer", "ms", times[CORE], times[PEFT], PEFT),
    ]


def layer_part(options: Options) -> Iterator[Rows | None]:
    for case in layer_cases(options):
        with quietly():
            rows = measure_layer(case, options)
        yield rows if rows else refused(str(case))
