"""How fast: one adapted layer, a whole training step, decoding and merging, beside PEFT and the frozen base.

    python benchmarks/speed.py                    # every part; the layers take most of the time
    python benchmarks/speed.py --part step
    python benchmarks/speed.py --quick

All subjects of a case run in one process, in an order shuffled anew each round, and no time is reported before they
have been found to compute the same. What each measure means is said in the README beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import math
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import plots
import torch
from bounds import matrix_products, other_work
from common import (
    MAX_DRIFT,
    RESULTS,
    Row,
    busy,
    compare,
    device_name,
    drift,
    milliseconds,
    race,
    show,
    steady_race,
    write_rows,
)
from control_plane import hold_against, output
from subjects import (
    CORE,
    FROZEN,
    FULL,
    LEAN,
    LEAN_BLOCK,
    PEFT,
    SUBJECTS,
    TUNED,
    TUNED_FAST,
    adapter_gradients,
    gpt2,
    is_lora,
    model_name,
    save_adapter,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import minipeft
from minipeft import gemm

FROZEN_FAST = "frozen layer, same products"
CALL_MS = 10.0  # a timed region of the layers is at least this long
ALPHA = 16  # of the layers
STEP_SUBJECTS = (FROZEN, FULL, PEFT, TUNED, TUNED_FAST, CORE, LEAN, LEAN_BLOCK)
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative, Frobenius norm of each tensor

Rows = list[Row]


@dataclass(frozen=True)
class Options:
    device: str
    dtype: torch.dtype
    rounds: int | None
    quick: bool
    force: bool

    def rounds_or(self, usual: int) -> int:
        return self.rounds or (2 if self.quick else usual)

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype)

    def race(self, calls: dict[str, Callable[[], Any]], rounds: int, reference: str, **others: Any) -> Any:
        return steady_race(calls, rounds, reference, force=self.force, device=self.device, **others)


# ------------------------------------------------------------------------------------------------------------- layers
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
        return gemm.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gemm.linear(dy, weight.t()), None, None


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


# -------------------------------------------------------------------------------------------------------------- steps
def step_models(options: Options, adapter: Path) -> dict[str, nn.Module]:
    base = options.place(gpt2(options.quick, use_cache=False))
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


def measure_step(models: dict[str, nn.Module], batch: int, tokens: int, options: Options) -> Rows | None:
    case = f"{model_name(options.quick)}, {batch}x{tokens} tokens"
    ids = torch.randint(models[FROZEN].config.vocab_size, (batch, tokens), device=options.device)
    steps = training_steps(models, ids)
    check_steps(models, steps, GRADIENT_TOLERANCE[options.dtype])
    bounds = {
        f"matrix products, {name}": matrix_products(models[FROZEN], batch, tokens, linear)
        for name, linear in (("minipeft.gemm", gemm.linear), ("torch.mm", gemm.torch_linear))
    }

    products, others = bounds["matrix products, minipeft.gemm"], other_work(models[LEAN], batch, tokens)
    bounds["matrix products, minipeft.gemm, and other work"] = lambda: (products(), others())

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
    with tempfile.TemporaryDirectory() as folder, quietly():
        models = step_models(options, save_adapter(gpt2(options.quick), Path(folder)))
    for batch, tokens in ((2, 32),) if options.quick else ((4, 512), (4, 256)):
        yield measure_step(models, batch, tokens, options)
    models.clear()
    yield rate_rows(options)


# -------------------------------------------------------------------------------------------------------------- rates
def rate_rows(options: Options) -> Rows:
    """What this machine can do: matrix products by both libraries, and copies."""
    m, k, n = (64, 48, 96) if options.quick else (4096, 768, 2304)
    new = torch.empty(0, device=options.device, dtype=options.dtype).new_empty
    x, weight = new(m, k).normal_(), new(n, k).normal_()
    rows = [rate(options, f"{m}x{k}x{n}", m * k * n, gemm.linear, torch.nn.functional.linear, x, weight)]
    for r in (8, 16, 64):
        narrow = new(k, r).normal_()
        rows.append(rate(options, f"{m}x{k}x{r}", m * k * r, gemm.narrow, torch.mm, x, narrow))
    return [*rows, copy_rates(options)]


def rate(options: Options, shape: str, products: int, ours: Any, theirs: Any, *inputs: Tensor) -> Row:
    calls = {"ours": lambda: ours(*inputs), "torch": lambda: theirs(*inputs)}
    with torch.no_grad():
        times = race(calls, options.rounds_or(20), device=options.device, repeats=5)
    rates = [[2e-6 * products / ms for ms in times[name]] for name in calls]
    return compare("speed_step", shape, "matrix product", "GFLOP/s", *rates, "torch", "minipeft.gemm")


def copy_rates(options: Options) -> Row:
    """Bytes read and written a second when an array is copied to one that is there already."""
    sizes = (2**16, 2**20) if options.quick else (64 * 10**6, 10**9)
    rates = []
    for size in sizes:
        source = torch.ones(size, dtype=torch.uint8, device=options.device)
        target = source.clone()
        calls = {"copy": lambda source=source, target=target: target.copy_(source)}
        times = race(calls, options.rounds_or(10), device=options.device)["copy"]
        rates.append([2e-6 * size / ms for ms in times])
    names = [f"array of {size / 1e6:.3g} MB" for size in sizes]
    return compare("speed_step", "copy, bytes read and written", "copy", "GB/s", *rates, names[1], names[0])


# ----------------------------------------------------------------------------------------------- decoding and merging
def decode_part(options: Options) -> Iterator[Rows | None]:
    prompt, new_tokens = 16, 8 if options.quick else 64
    base = options.place(gpt2(options.quick)).eval()
    with tempfile.TemporaryDirectory() as folder, quietly():
        adapter = save_adapter(gpt2(options.quick), Path(folder))
        theirs, ours = (SUBJECTS[name](copy.deepcopy(base), adapter).eval() for name in (PEFT, CORE))
        merged = minipeft.load_adapter(copy.deepcopy(base), adapter).merge_and_unload().eval()
    models = {"base": base, PEFT: theirs, CORE: ours, "minipeft, merged": merged}
    ids = torch.randint(base.config.vocab_size, (1, prompt), device=options.device)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def call(model: nn.Module) -> Callable[[], Tensor]:
        whole = torch.ones_like(ids)
        return lambda: model.generate(
            input_ids=ids, attention_mask=whole, do_sample=False, use_cache=True, pad_token_id=0, **length
        )

    calls = {name: call(model) for name, model in models.items()}
    if not torch.equal(calls[PEFT](), calls[CORE]()):
        raise SystemExit("decode: ours and PEFT generate different tokens; no time is reported")
    case = f"{model_name(options.quick)}, {prompt} + {new_tokens} tokens, batch 1"
    times = options.race(calls, options.rounds_or(20), "base")
    if times is None:
        yield refused(case)
        return
    pairs = [(name, "base") for name in models if name != "base"] + [(CORE, PEFT)]
    yield [compare("speed_decode", case, "greedy decoding", "ms", times[a], times[b], b, a) for a, b in pairs]


def merge_part(options: Options) -> Iterator[Rows | None]:
    base = options.place(gpt2(options.quick)).eval()
    x = torch.arange(32, device=options.device)[None]
    with tempfile.TemporaryDirectory() as folder, quietly():
        adapter = save_adapter(gpt2(options.quick), Path(folder))
        models = {name: SUBJECTS[name](copy.deepcopy(base), adapter).eval() for name in (PEFT, CORE)}
    expected = output(models[PEFT], x)
    verbs: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
        CORE: (CORE, lambda model: model.merge_and_unload()),
        PEFT: (PEFT, lambda model: model.merge_and_unload()),
        "PEFT, safe_merge=True": (PEFT, lambda model: model.merge_and_unload(safe_merge=True)),
    }
    times: dict[str, list[float]] = {name: [] for name in verbs}
    rounds = options.rounds_or(20)
    for index in range(rounds + 2):
        for name, (subject, verb) in list(verbs.items())[:: 1 if index % 2 else -1]:
            twin = copy.deepcopy(models[subject])
            merged: list[nn.Module] = []
            elapsed = milliseconds(
                lambda twin=twin, verb=verb, merged=merged: merged.append(verb(twin)), options.device
            )
            hold_against(expected, merged[0], x)
            if index >= 2:
                times[name].append(elapsed)
    case = model_name(options.quick)
    if not options.force and drift(times[PEFT]) > MAX_DRIFT:
        yield refused(case)
        return
    peers = [name for name in verbs if name != CORE]
    yield [compare("speed_merge", case, "merge_and_unload", "ms", times[CORE], times[peer], peer) for peer in peers]


# --------------------------------------------------------------------------------------------------------------- main
PARTS: dict[str, Callable[[Options], Iterator[Rows | None]]] = {
    "layer": layer_part,
    "step": step_part,
    "decode": decode_part,
    "merge": merge_part,
}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without PEFT's notes on fan_in_fan_out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refused(case: str) -> None:
    print(
        f"{case}: refused, since the time of what all is compared with drifted by more than {MAX_DRIFT:.0%}", flush=True
    )


def run_part(part: str, options: Options, folder: Path | None) -> bool:
    """Measure, print and write one part; False where a case was refused."""
    gc.collect()
    gc.freeze()  # what is loaded by now need not be looked through before every timed call
    rows: Rows = []
    complete = True
    for some in PARTS[part](options):
        complete = complete and some is not None
        for row in some or ():
            row.device = device_name(options.device)
            rows.append(row)
            show(row)
    if folder is not None and rows:
        print(write_rows(f"speed_{part}" + ("_cuda" if options.device == "cuda" else ""), rows, folder))
    return complete


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds, nothing written without --output")
    parser.add_argument("--part", choices=list(PARTS), action="append", help="several may be given; default: all")
    parser.add_argument("--rounds", type=int, help="default: 30 for layers, 10 for steps, 20 for the rest")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="default: 2; --quick takes 1")
    parser.add_argument("--force", action="store_true", help="report what was measured on a busy or unsteady machine")
    parser.add_argument("--output", type=Path, help="folder for the rows and plots; default: benchmarks/results")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1 if args.quick else args.threads)
    why = None if args.force or args.quick else busy()
    if why is not None:
        raise SystemExit(why)
    options = Options(args.device, getattr(torch, args.dtype), args.rounds, args.quick, args.force or args.quick)
    folder = args.output or (None if args.quick else RESULTS)
    complete = [run_part(part, options, folder) for part in args.part or PARTS]
    if folder is not None:
        plots.draw(folder)
    if not complete:
        raise SystemExit(
            "some cases were refused: the machine is not steady enough (--force reports them all the same)"
        )


if __name__ == "__main__":
    main()
