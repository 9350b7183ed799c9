"""LoRA of fused experts, next to PEFT and the frozen base: step time, peak memory and what is kept: a part of speed.py.

Both libraries read the same adapter of both parameters, saved by PEFT. PEFT forms W + BA of all experts for each call.
"""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from memory import forget_peak, status_mib
from methods import saved_by_peft
from options import Options, quietly, refused
from rows import Row, Rows, compare
from saved import saved_bytes
from subjects import CORE, FROZEN, PEFT, by_peft, frozen, ours
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
SUBJECTS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {FROZEN: frozen, PEFT: by_peft, CORE: ours}
WAYS = ("grouped_mm", "eager")  # of transformers; its third copies an expert for each choice of each token
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # a rounded router chooses other experts
COMMON = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def mixtral(quick: bool) -> MixtralForCausalLM:
    """Mixtral 8x7B, an eighth as wide: 8 experts of 3.5 times the width, two a token."""
    width = 64 if quick else 512
    sizes = {"hidden_size": width, "intermediate_size": width * 7 // 2, "num_local_experts": 8}
    return MixtralForCausalLM(MixtralConfig(**COMMON, **sizes, **_depth(quick)))


def qwen3(quick: bool) -> Qwen3MoeForCausalLM:
    """Qwen3-30B-A3B, a quarter as wide: 128 experts of 3/8 of the width, eight a token."""
    width, experts = (64, 16) if quick else (512, 128)
    sizes = {"hidden_size": width, "moe_intermediate_size": width * 3 // 8, "num_experts": experts}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, **sizes, num_experts_per_tok=8, head_dim=width // 8, **_depth(quick))
    )


def _depth(quick: bool) -> dict[str, int]:
    return {"num_hidden_layers": 1, "vocab_size": 101} if quick else {"num_hidden_layers": 4, "vocab_size": 4096}


MODELS: dict[str, Callable[[bool], Any]] = {"Mixtral": mixtral, "Qwen3-MoE": qwen3}


def model_of(kind: str, way: str, options: Options) -> Any:
    torch.manual_seed(0)
    model = options.place(MODELS[kind](options.quick))
    model.set_experts_implementation(way)
    return model


def ids_of(options: Options) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(101, (2, 32) if options.quick else (4, 256), device=options.device)


def step_of(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """Forward and backward pass through all blocks, also of the frozen base; returns the loss."""
    language_model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    embed = language_model.get_input_embeddings()

    def step() -> Tensor:
        embeddings = embed(ids).detach().requires_grad_()
        loss: Tensor = language_model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def check_alike(models: dict[str, nn.Module], steps: dict[str, Callable[[], Tensor]], tolerance: float) -> None:
    """Loss and the length of every gradient, which the libraries name differently, must be PEFT's."""
    found = {}
    for name in (PEFT, CORE):
        loss = float(steps[name]())
        lengths = [float(p.grad.norm()) for p in models[name].parameters() if p.grad is not None]
        found[name] = torch.tensor([loss, *sorted(lengths)], dtype=torch.float64)
        models[name].zero_grad(set_to_none=True)
    if found[CORE].shape != found[PEFT].shape or not torch.allclose(found[CORE], found[PEFT], rtol=tolerance):
        raise SystemExit("experts: loss or gradients differ from PEFT's; no time is reported")


def peak(subject: str, kind: str, way: str, options: Options, adapter: Path) -> float:
    """MiB over the model's own at the highest point of two steps; in a process of its own."""
    with quietly():
        model = SUBJECTS[subject](model_of(kind, way, options), adapter).train()
    step = step_of(model, ids_of(options))
    cuda = options.device == "cuda"
    before = torch.cuda.memory_allocated() / 2**20 if cuda else status_mib("VmRSS")
    forget_peak(options.device)
    for _ in range(2):
        step()
        model.zero_grad(set_to_none=True)
    return (torch.cuda.max_memory_allocated() / 2**20 if cuda else status_mib("VmHWM")) - before


def peaks(kind: str, way: str, options: Options, adapter: Path) -> dict[str, list[float]]:
    context = multiprocessing.get_context("fork" if options.quick and options.device == "cpu" else "spawn")
    found = {}
    for subject in SUBJECTS:
        with context.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as process:
            found[subject] = [process.apply(peak, (subject, kind, way, options, adapter))]
    return found


def measured(kind: str, way: str, options: Options, adapter: Path) -> Rows | None:
    ids, dtype = ids_of(options), str(options.dtype).removeprefix("torch.")
    case = f"{'tiny ' * options.quick}{kind}, {way}, {len(ids)}x{ids.shape[1]} tokens, {dtype}"
    base = model_of(kind, way, options)
    with quietly():
        models = {name: make(copy.deepcopy(base), adapter).train() for name, make in SUBJECTS.items()}
    steps = {name: step_of(model, ids) for name, model in models.items()}
    check_alike(models, steps, TOLERANCE[options.dtype])

    def clean_up() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    times = options.race(steps, options.rounds_or(5), FROZEN, clean_up=clean_up, warm_ups=1)
    if times is None:
        return refused(case)
    kept = {name: [saved_bytes(steps[name], model) / 2**20] for name, model in models.items()}
    models.clear()
    steps.clear()
    found = (("training step", "ms", times), ("kept for backward", "MiB", kept))
    measures = (*found, ("peak memory over the model", "MiB", peaks(kind, way, options, adapter)))
    return [row for what, unit, by in measures for row in _rows(case, what, unit, by)]


def _rows(case: str, what: str, unit: str, by: dict[str, list[float]]) -> Iterator[Row]:
    for subject, peer in ((CORE, PEFT), (CORE, FROZEN), (PEFT, FROZEN)):
        yield compare("speed_experts", case, what, unit, by[subject], by[peer], peer, subject)


def experts_part(options: Options) -> Iterator[Rows | None]:
    for kind in MODELS:
        with tempfile.TemporaryDirectory() as folder, quietly():
            config = peft.LoraConfig(r=8, target_modules=[], target_parameters=PARAMETERS)
            adapter = saved_by_peft(model_of(kind, "eager", options), config, Path(folder))
            for way in WAYS:
                yield measured(kind, way, options, adapter)
