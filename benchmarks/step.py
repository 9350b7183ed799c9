"""A whole training step, next to PEFT, the frozen base and the least work that a step needs: a part of speed.py."""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from bounds import matrix_products, other_work
from options import Options, quietly, refused
from rates import rate_rows
from rows import Rows, compare
from subjects import (
    CORE,
    FROZEN,
    FULL,
    LEAN,
    LEAN_BLOCK,
    LEAN_NONE,
    MODELS,
    PEFT,
    SUBJECTS,
    TUNED,
    TUNED_FAST,
    adapter_gradients,
    is_lora,
    model_name,
    save_adapter,
)
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from minipeft.kernels import matmul

STEP_SUBJECTS = (FROZEN, FULL, PEFT, TUNED, TUNED_FAST, CORE, LEAN_NONE, LEAN, LEAN_BLOCK)
# Relative, Frobenius norm of each tensor. In bfloat16, two orders of the same sums differ by up to 0.06 in a tiny model.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Precision:
    """In what a step computes."""

    name: str  # after the model's in a case
    base: torch.dtype
    autocast: bool = False

    @property
    def tolerance(self) -> float:
        return GRADIENT_TOLERANCE[torch.bfloat16 if self.autocast else self.base]

    def context(self, device: str) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(device, torch.bfloat16) if self.autocast else contextlib.nullcontext()


FLOAT32 = Precision("", torch.float32)
HALF = (Precision(", bfloat16 base", torch.bfloat16), Precision(", autocast to bfloat16", torch.float32, autocast=True))


def precisions(options: Options) -> tuple[Precision, ...]:
    """Those that the device multiplies in; a CPU without instructions for bfloat16 takes minutes for a step of PEFT's."""
    half = HALF if options.device != "cpu" or matmul.has_kernels(torch.bfloat16) else ()
    if options.quick:
        return half if options.dtype == torch.bfloat16 else (FLOAT32,)
    return (*half, FLOAT32)


def step_models(
    options: Options, make: Callable[..., nn.Module], adapter: Path, dtype: torch.dtype
) -> dict[str, nn.Module]:
    base = make(options.quick, use_cache=False).to(options.device, dtype)
    return {name: SUBJECTS[name](copy.deepcopy(base), adapter).train() for name in STEP_SUBJECTS}


def training_steps(
    models: dict[str, nn.Module], ids: Tensor, precision: Precision = FLOAT32
) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward pass of each model; returns the loss.

    The frozen base gets embeddings that require a gradient, so that its backward pass runs through all blocks.
    """

    def call(model: nn.Module, inputs: Callable[[], dict[str, Tensor]]) -> Callable[[], Tensor]:
        def step() -> Tensor:
            with precision.context(ids.device.type):
                loss = model(**inputs(), labels=ids).loss
            loss.backward()
            return loss.detach()

        return step

    embeddings = models[FROZEN].get_input_embeddings()(ids)
    steps = {name: call(model, lambda: {"input_ids": ids}) for name, model in models.items()}
    # A leaf of its own in each step, so that no gradient is added to the last step's.
    frozen = call(models[FROZEN], lambda: {"inputs_embeds": embeddings.detach().requires_grad_()})
    return steps | {FROZEN: frozen}


def check_steps(models: dict[str, nn.Module], steps: dict[str, Callable[[], Tensor]], tolerance: float) -> None:
    """Loss and every adapter gradient of each LoRA subject must be those of stock PEFT."""

    def losses_and_gradients(name: str) -> dict[str, Tensor]:
        loss = steps[name]()
        found = {key: gradient.clone() for key, gradient in adapter_gradients(models[name]).items()}
        models[name].zero_grad(set_to_none=True)
        return {"loss": loss} | found

    expected = losses_and_gradients(PEFT)
    for name in filter(is_lora, models):
        found = losses_and_gradients(name)
        if found.keys() != expected.keys():
            raise SystemExit(
                f"{name}: adapter tensors differ from PEFT's: {sorted(found.keys() ^ expected.keys())[:4]}"
            )
        for key, value in expected.items():
            error = float((found[key] - value).norm() / value.norm())
            if not error <= tolerance:
                raise SystemExit(f"{name}: {key} differs from PEFT's by {error:.2e}, relatively; no time is reported")


def bounds_of(
    models: dict[str, nn.Module], batch: int, tokens: int, precision: Precision
) -> dict[str, Callable[[], object]]:
    """The least work of a step, by name; none under autocast, which also converts weights."""
    if precision.autocast:
        return {}
    bounds: dict[str, Callable[[], object]] = {
        f"matrix products, {name}": matrix_products(models[FROZEN], batch, tokens, linear)
        for name, linear in (("minipeft.kernels.matmul", matmul.linear), ("torch.mm", matmul.torch_linear))
    }
    if isinstance(models[FROZEN], GPT2LMHeadModel) and precision == FLOAT32:  # whose factors have the weights' dtype
        products, others = bounds["matrix products, minipeft.kernels.matmul"], other_work(models[LEAN], batch, tokens)
        bounds["matrix products, minipeft.kernels.matmul, and other work"] = lambda: (products(), others())
    return bounds


def case_name(name: str, precision: Precision, batch: int, tokens: int, options: Options) -> str:
    return f"{model_name(options.quick, name)}{precision.name}, {batch}x{tokens} tokens"


def measure_step(
    case: str, models: dict[str, nn.Module], batch: int, tokens: int, options: Options, precision: Precision
) -> Rows | None:
    ids = torch.randint(models[FROZEN].config.vocab_size, (batch, tokens), device=options.device)
    steps = training_steps(models, ids, precision)
    check_steps(models, steps, precision.tolerance)
    bounds = bounds_of(models, batch, tokens, precision)

    def clean_up() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    times = options.race(steps | bounds, options.rounds_or(10), FROZEN, clean_up=clean_up)
    if times is None:
        return refused(case)
    rows = [compare("speed_step", case, "training step", "ms", times[n], times[PEFT], PEFT, n) for n in models]
    pairs = [(LEAN, peer) for peer in (TUNED, TUNED_FAST, FROZEN, FULL, CORE)] + [(LEAN_NONE, CORE)]
    for ours, peer in pairs:
        rows.append(compare("speed_step", case, "training step", "ms", times[ours], times[peer], peer, ours))
    return rows + [
        compare("speed_step", case, "share of the step", "ms", times[n], times[LEAN], LEAN, n) for n in bounds
    ]


def step_part(options: Options) -> Iterator[Rows | None]:
    for (name, make), precision in itertools.product(MODELS.items(), precisions(options)):
        sizes = ((2, 32),) if options.quick else ((4, 512), (4, 256))
        cases = {case_name(name, precision, *size, options): size for size in sizes}
        if not any(options.case in case for case in cases):
            continue
        with tempfile.TemporaryDirectory() as folder, quietly():
            models = step_models(options, make, save_adapter(make(options.quick), Path(folder)), precision.base)
        for case, size in cases.items():
            if options.case in case:
                yield measure_step(case, models, *size, options, precision)
        models.clear()
    if not options.case:
        yield rate_rows(options)
