"""Every method that PEFT has too: a training step, a token, and what is kept for the backward pass: a part of speed.py.

Both libraries read the same adapter, saved by PEFT with every trainable value moved from where it starts.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from options import Options, quietly, refused
from rows import Rows, compare
from saved import saved_bytes
from subjects import CORE, PEFT, by_peft, ours
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

METHODS: dict[str, Callable[..., peft.PeftConfig]] = {
    "LoRA": lambda **where: peft.LoraConfig(r=8, **where),
    "DoRA": lambda **where: peft.LoraConfig(r=8, use_dora=True, **where),
    "LoRA and 8 tokens": lambda **where: peft.LoraConfig(r=8, trainable_token_indices=list(range(90, 98)), **where),
    "IA3": lambda **where: peft.IA3Config(feedforward_modules=["down_proj"], **where),
    "VeRA": lambda **where: peft.VeraConfig(r=256, **where),
    "AdaLoRA": lambda **where: peft.AdaLoraConfig(total_step=100, **where),
    "LoHa": lambda **where: peft.LoHaConfig(r=8, **where),
    "LoKr": lambda **where: peft.LoKrConfig(r=8, **where),
    "OFT": lambda **where: peft.OFTConfig(oft_block_size=32, **where),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOVED = 0.02  # standard deviation
TOLERANCE = 1e-3  # relative, of the loss and of the length of every gradient


def llama(quick: bool) -> LlamaForCausalLM:
    """A Llama of GPT-2's size, 12 layers of width 768, with random weights; PEFT has no LoHa for GPT-2's layers."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    vocabulary = 101 if quick else 32_000
    return LlamaForCausalLM(
        LlamaConfig(**(small if quick else sizes), vocab_size=vocabulary, bos_token_id=0, eos_token_id=0)
    )


def saved_by_peft(base: nn.Module, config: peft.PeftConfig, folder: Path) -> Path:
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=MOVED)
    model.save_pretrained(folder)
    return folder


def step_of(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """Forward and backward pass; returns the loss. AdaLoRA's own loss is left out, in both libraries."""
    language_model: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model

    def step() -> Tensor:
        loss: Tensor = language_model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


@torch.no_grad()
def token(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids[:1, :1]).logits
    return logits


def check_alike(method: str, models: dict[str, nn.Module], steps: dict[str, Callable[[], Tensor]]) -> None:
    """Loss and gradients, which the libraries name differently, in the order of their lengths."""
    found = {}
    for name, model in models.items():
        loss = steps[name]()
        lengths = [float(p.grad.norm()) for p in model.parameters() if p.requires_grad and p.grad is not None]
        found[name] = torch.tensor([float(loss), *sorted(lengths)], dtype=torch.float64)
        model.zero_grad(set_to_none=True)
    if found[CORE].shape != found[PEFT].shape or not torch.allclose(
        found[CORE], found[PEFT], rtol=TOLERANCE, atol=1e-9
    ):
        raise SystemExit(f"{method}: loss or gradients differ from PEFT's; no time is reported")


def methods_part(options: Options) -> Iterator[Rows | None]:
    base = options.place(llama(options.quick))
    ids = torch.randint(101, (2, 16 if options.quick else 256), device=options.device)
    shape = f"{ids.shape[0]}x{ids.shape[1]} tokens"
    for method, config in METHODS.items():
        case = f"{method}, {'tiny' if options.quick else '12 layer, width 768'} Llama, {shape}"
        with tempfile.TemporaryDirectory() as folder, quietly():
            adapter = saved_by_peft(copy.deepcopy(base), config(target_modules=TARGETS), Path(folder))
            models = {PEFT: by_peft(copy.deepcopy(base), adapter), CORE: ours(copy.deepcopy(base), adapter)}
        yield _measured(method, case, {name: model.train() for name, model in models.items()}, ids, options)
        models.clear()


def _measured(method: str, case: str, models: dict[str, nn.Module], ids: Tensor, options: Options) -> Rows | None:
    def clean_up() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    steps = {name: step_of(model, ids) for name, model in models.items()}
    check_alike(method, models, steps)
    times = options.race(steps, options.rounds_or(5), PEFT, clean_up=clean_up, warm_ups=1)
    kept = {name: [saved_bytes(steps[name], model) / 2**20] for name, model in models.items()}
    clean_up()
    for model in models.values():
        model.eval()
    calls: dict[str, Callable[[], Any]] = {
        name: lambda model=model: token(model, ids) for name, model in models.items()
    }  # type: ignore[misc]
    tokens = options.race(calls, options.rounds_or(20), PEFT)
    if times is None or tokens is None:
        return refused(case)
    measures = (("training step", "ms", times), ("one token", "ms", tokens), ("kept for backward", "MiB", kept))
    return [compare("speed_methods", case, what, unit, by[CORE], by[PEFT], PEFT) for what, unit, by in measures]
