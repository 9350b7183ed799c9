"""A training step on a GPU: its time and peak memory, of models that people train there; next to PEFT, tuned and not.

    python benchmarks/gpu.py                      # needs a GPU of 80 GiB, bitsandbytes, and liger-kernel for its rows
    python benchmarks/gpu.py --model "Llama 1B" --base bf16
    python benchmarks/gpu.py --quick              # a tiny model, on the CPU if there is no GPU; nothing is written

A step is forward, backward and a fused AdamW whose learning rate is 0, so that all subjects can share one frozen base.
Each subject is alone on the device with it. Losses and gradients are held against PEFT's before anything is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from options import quietly
from rows import RESULTS, Row, Rows, compare, on_device, show, write_rows
from subjects import (
    BUILDERS,
    CORE,
    FULL,
    LEAN,
    LEAN_BLOCK,
    LEAN_MLP,
    LEAN_NONE,
    LEAN_SQRT,
    PEFT,
    PEFT_CHECKPOINTED,
    TUNED,
    adapter_gradients,
    by_peft,
    nf4,
    ours,
    save_adapter,
)
from timing import milliseconds, settle
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

LIGER = "PEFT and Liger"
CORE_LIGER = "minipeft and Liger"
WITH_LIGER = {LIGER: by_peft, CORE_LIGER: ours}
AUTOCAST, COMPILED = ", autocast", ", compiled"
ROUNDS, QUICK = (2, 6), (0, 1)  # warming up, and timed
# Of the norm of all gradients together. On a bfloat16 base of 32 layers PEFT is 0.12 from itself under autocast.
GRADIENT_TOLERANCE = 0.2
WITH_AUTOCAST = (PEFT, LIGER, CORE, LEAN)
COMPARED = (
    FULL,
    PEFT,
    PEFT_CHECKPOINTED,
    TUNED,
    LIGER,
    CORE,
    CORE_LIGER,
    LEAN_NONE,
    LEAN,
    LEAN_MLP,
    LEAN_BLOCK,
    LEAN_SQRT,
)
COMPILABLE = (PEFT, TUNED, CORE, LEAN)


@dataclass(frozen=True)
class Shape:
    """A published model's shape, with random weights, and the batches that it is trained on here."""

    name: str
    config: Callable[[], Any]
    batches: tuple[tuple[int, int], ...]
    compiled: bool = False  # whether it is small enough to wait for the compiler


def llama(hidden: int, inner: int, layers: int, words: int = 128_256, **others: Any) -> Callable[[], Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words}
    heads = {"num_attention_heads": hidden // others.pop("head", 128), "num_key_value_heads": others.pop("groups", 8)}
    return lambda: LlamaConfig(**sizes, **heads, use_cache=False, **others)


def qwen3_4b() -> Any:
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151_936}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    return Qwen3Config(**sizes, **heads, use_cache=False, tie_word_embeddings=True)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Llama 1B", llama(2048, 8192, 16, head=64, tie_word_embeddings=True), ((8, 512), (4, 2048))),
        Shape("Llama 8B", llama(4096, 14336, 32), ((8, 512), (4, 2048))),
        Shape("Qwen3 4B", qwen3_4b, ((8, 512),)),
        Shape("Llama 8B of 4 layers", llama(4096, 14336, 4), ((8, 512),), compiled=True),
    )
}
TINY = Shape("tiny Llama", llama(32, 64, 2, 101, head=16, groups=1, bos_token_id=0, eos_token_id=0), ((2, 32),))
BASES: dict[str, Callable[[nn.Module], nn.Module]] = {"bf16": lambda base: base, "NF4": nf4}


def random_base(shape: Shape, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)


def sharing(base: nn.Module) -> nn.Module:
    """A copy of the modules around the same weights."""
    memo = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, memo)


@contextlib.contextmanager
def liger(model: nn.Module) -> Iterator[None]:
    """Liger's kernels in this model; its rotary embedding is put into transformers' own module, for as long."""
    import liger_kernel.transformers as kernels

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    home = sys.modules[type(base).__module__]
    kept = {name: vars(home)[name] for name in vars(home) if isinstance(vars(home)[name], type) or "rotary" in name}
    getattr(kernels, f"apply_liger_kernel_to_{base.config.model_type}")(model=base)
    try:
        yield
    finally:
        vars(home).update(kept)


def build(subject: str, base: nn.Module, adapter: Path) -> nn.Module:
    return (BUILDERS | WITH_LIGER)[plain(subject)](base, adapter)


def plain(subject: str) -> str:
    """What a subject is, however it is called."""
    return subject.removesuffix(AUTOCAST).removesuffix(COMPILED)


@dataclass
class Measured:
    """What the steps of one subject took, and what they computed."""

    times: list[float]
    peak: float
    loss: float
    gradients: dict[str, Tensor]


def run(subject: str, base: nn.Module, adapter: Path, ids: Tensor, rounds: tuple[int, int]) -> Measured:
    """Steps of one subject: milliseconds of each, the peak of the memory allocated in MiB, and the first step's gradients."""
    device = ids.device.type
    model = build(subject, sharing(base), adapter).train()
    if subject == FULL:
        model.requires_grad_(True)
    call = torch.compile(model) if subject.endswith(COMPILED) else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    casting = torch.autocast(device, torch.bfloat16, enabled=subject.endswith(AUTOCAST))
    losses: list[Tensor] = []

    def step() -> None:
        with casting:
            loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())

    def whole_step() -> None:
        step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with liger(model) if plain(subject) in WITH_LIGER else contextlib.nullcontext():
        step()
        gradients = {} if subject == FULL else {n: g.to("cpu", copy=True) for n, g in adapter_gradients(model).items()}
        optimizer.zero_grad(set_to_none=True)
        for _ in range(rounds[0]):
            whole_step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = [milliseconds(whole_step, device) for _ in range(rounds[1])]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    return Measured(times, peak, float(losses[0]), gradients)


def differs(found: Measured, expected: Measured) -> str | None:
    """How a subject's first step differs from PEFT's, or None."""
    if abs(found.loss / expected.loss - 1) > 1e-2:
        return f"its loss is {found.loss}, PEFT's {expected.loss}"
    if found.gradients.keys() != expected.gradients.keys():
        return f"its adapter differs in {sorted(found.gradients.keys() ^ expected.gradients.keys())[:3]}"
    pairs = [(found.gradients[name].float(), value.float()) for name, value in expected.gradients.items()]
    error = (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5
    return f"its gradients differ by {float(error):.3f}" if not float(error) <= GRADIENT_TOLERANCE else None


def subjects_of(shape: Shape, base: str) -> list[str]:
    if shape.compiled:
        return [*COMPILABLE, *(name + COMPILED for name in COMPILABLE)]
    names = (FULL, PEFT, CORE, LEAN, PEFT + AUTOCAST) if shape is TINY else COMPARED
    names += () if shape is TINY else tuple(name + AUTOCAST for name in WITH_AUTOCAST)
    return [name for name in names if base == "bf16" or name != FULL]  # nobody trains all of a packed model


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    case: str, subjects: list[str], base: nn.Module, adapter: Path, ids: Tensor, rounds: tuple[int, int] = ROUNDS
) -> Rows:
    """The rows of all subjects on one base and batch; what runs out of memory or computes another thing has none."""
    found: dict[str, Measured] = {}
    for subject in subjects:
        torch._dynamo.reset()
        try:
            with quietly():
                result = run(subject, base, adapter, ids, rounds)
        except torch.OutOfMemoryError:
            print(f"{case} | {subject}: out of memory", flush=True)
            continue
        except ImportError as error:
            print(f"{case} | {subject}: left out, {error}", flush=True)
            continue
        finally:
            base.requires_grad_(False)
            free()
        why = differs(result, found[PEFT]) if subject != FULL and PEFT in found else None
        median = sorted(result.times)[len(result.times) // 2]
        print(f"{case} | {subject}: {median:.1f} ms, {result.peak:.0f} MiB{'; ' + why if why else ''}", flush=True)
        if why is None:
            found[subject] = result
    return list(rows_of(case, found))


def rows_of(case: str, found: dict[str, Measured]) -> Iterator[Row]:
    """Each subject beside PEFT, PEFT under autocast, PEFT with Liger and full fine-tuning, as far as they were measured."""
    peers = [name for name in (PEFT, LIGER, PEFT + AUTOCAST, PEFT + COMPILED, FULL) if name in found]
    for subject, peer in itertools.product(found, peers):
        if subject == peer:
            continue
        ours, theirs = found[subject], found[peer]
        yield compare("gpu_step", case, "training step", "ms", ours.times, theirs.times, peer, subject)
        if ours.peak:
            peaks = [ours.peak], [theirs.peak]
            yield compare("gpu_step", case, "peak allocated memory", "MiB", *peaks, peer, subject)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, nothing written without --output")
    parser.add_argument("--model", action="append", choices=SHAPES, help="may be given again; default: all")
    parser.add_argument("--base", action="append", choices=BASES, help="may be given twice; default: both")
    known = sorted({name for shape in SHAPES.values() for kind in BASES for name in subjects_of(shape, kind)})
    parser.add_argument(
        "--subject", action="append", choices=known, help="may be given again; default: all that suit the base"
    )
    parser.add_argument(
        "--batch", type=int, choices=(0, 1), help="which of a model's batches; default: all that it has"
    )
    parser.add_argument("--output", type=Path, help="folder for the rows; default: benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        raise SystemExit("this benchmark is for a GPU, and torch sees none (--quick tries it out on the CPU)")
    folder = args.output or (None if args.quick else RESULTS)
    settle()
    rows: Rows = []
    for shape in [TINY] if args.quick else [SHAPES[name] for name in args.model or SHAPES]:
        for kind in ["bf16"] if shape.compiled else args.base or BASES:
            free()
            base = random_base(shape, device)
            with tempfile.TemporaryDirectory() as scratch, quietly():
                adapter = save_adapter(sharing(base), Path(scratch), r=16, lora_alpha=16)
                base = BASES[kind](base).requires_grad_(False)
                subjects = [name for name in subjects_of(shape, kind) if name in (args.subject or [name])]
                for batch, tokens in shape.batches if args.batch is None else shape.batches[args.batch :][:1]:
                    torch.manual_seed(2)
                    ids = torch.randint(base.config.vocab_size, (batch, tokens), device=device)
                    case = f"{shape.name}, {kind} base, {batch}x{tokens} tokens"
                    some = measure(case, subjects, base, adapter, ids, QUICK if args.quick else ROUNDS)
                    for row in some:
                        show(on_device(row, device))
                    rows += some
                    if folder is not None:
                        write_rows("gpu_step", rows, folder)  # what there is, should the next case stop
            del base


if __name__ == "__main__":
    main()
