"""A whole training step, next to PEFT, the frozen base and the least work that a step needs: a part of speed.py."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
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

STEP_SUBJECTS = (FROZEN, FULL, PEFT, TUNED, TUNED_FAST, CORE, LEAN, LEAN_BLOCK)
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative, Frobenius norm of each tensor


def step_models(options: Options, make: Callable[..., nn.Module], adapter: Path) -> dict[str, nn.Module]:
    base = options.place(make(options.quick, use_cache=False))
    return {name: SUBJECTS[name](copy.deepcopy(base), adapter).train() for name in STEP_SUBJECTS}


def training_steps(models: dict[str, nn.Module], ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward pass of each model; returns the loss.

    The frozen base gets embeddings that require a gradient, so that its backward pass runs through all blocks.
    """

    def call(model: nn.Module, inputs: Callable[[], dict[str, Tensor]]) -> Callable[[], Tensor]:
        def step() -> Tensor:
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


def measure_step(name: str, models: dict[str, nn.Module], batch: int, tokens: int, options: Options) -> Rows | None:
    case = f"{model_name(options.quick, name)}, {batch}x{tokens} tokens"
    ids = torch.randint(models[FROZEN].config.vocab_size, (batch, tokens), device=options.device)
    steps = training_steps(models, ids)
    check_steps(models, steps, GRADIENT_TOLERANCE[options.dtype])
    bounds = {
        f"matrix products, {name}": matrix_products(models[FROZEN], batch, tokens, linear)
        for name, linear in (("minipeft.kernels.matmul", matmul.linear), ("torch.mm", matmul.torch_linear))
    }

    if isinstance(models[FROZEN], GPT2LMHeadModel):
        products, others = bounds["matrix products, minipeft.kernels.matmul"], other_work(models[LEAN], batch, tokens)
        bounds["matrix products, minipeft.kernels.matmul, and other work"] = lambda: (products(), others())

    def clean_up() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    times = options.race(steps | bounds, options.rounds_or(10), FROZEN, clean_up=clean_up)
    if times is None:
        return refused(case)
    rows = [compare("speed_step", case, "training step", "ms", times[n], times[PEFT], PEFT, n) for n in models]
    for peer in (TUNED, TUNED_FAST, FROZEN, FULL):
        rows.append(compare("speed_step", case, "training step", "ms", times[LEAN], times[peer], peer, LEAN))
    return rows + [
        compare("speed_step", case, "share of the step", "ms", times[n], times[LEAN], LEAN, n) for n in bounds
    ]


def step_part(options: Options) -> Iterator[Rows | None]:
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as folder, quietly():
            models = step_models(options, make, save_adapter(make(options.quick), Path(folder)))
        for batch, tokens in ((2, 32),) if options.quick else ((4, 512), (4, 256)):
            yield measure_step(name, models, batch, tokens, options)
        models.clear()
    yield rate_rows(options)
