"""How much memory: the peak of a training step, a fresh process for each subject, and the bytes kept for backward.

    python benchmarks/memory.py                   # GPT-2 and a Llama of its size, 8 x 512 tokens: needs 10 GiB free
    python benchmarks/memory.py --model "Llama 134M" --output somewhere
    python benchmarks/memory.py --quick

The losses of all LoRA subjects on one kind of base must agree in both steps, or nothing is reported. On a processor with
AVX512-BF16, bitsandbytes' own layers work as anywhere else here: nothing is evaluated.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plots
import torch
from rows import RESULTS, Row, compare, on_device, show, write_rows
from saved import saved_bytes
from subjects import (
    BF16,
    CORE,
    FULL,
    FULL_CHECKPOINTED,
    LEAN,
    LEAN_BLOCK,
    LEAN_MLP,
    LEAN_SQRT,
    MODELS,
    NF4,
    NF4_BF16,
    PEFT,
    PEFT_CHECKPOINTED,
    SUBJECTS,
    TUNED,
    base_bytes,
    base_of,
    is_lora,
    model_name,
    peer,
    save_adapter,
)
from torch import Tensor, nn

from minipeft.kernels.glibc import trim
from minipeft.kernels.matmul import has_kernels

MIB = 2**20
TINY = "tiny"  # the folder of the tiny model's adapter
LOSS_TOLERANCE = {"": 1e-4, NF4: 1e-4, BF16: 1e-3, NF4_BF16: 1e-3}  # relative
IN_FLOAT32 = (FULL, PEFT, TUNED, PEFT_CHECKPOINTED, CORE, LEAN, LEAN_MLP, LEAN_BLOCK, LEAN_SQRT, FULL_CHECKPOINTED)
IN_HALF = (PEFT, CORE, LEAN, LEAN_BLOCK, LEAN_SQRT)
COMPARED = (*IN_FLOAT32, FULL + BF16, *(each + ending for ending in (BF16, NF4, NF4_BF16) for each in IN_HALF))
QUICK = (FULL, PEFT, LEAN_BLOCK, PEFT + NF4, CORE + NF4, PEFT + BF16, LEAN_SQRT + BF16)
# Torch multiplies in bfloat16 number by number on a processor without instructions for it: these take 10 minutes or more.
TOO_SLOW = (FULL + BF16, PEFT + BF16, PEFT + NF4_BF16, CORE + BF16, CORE + NF4_BF16)


@dataclass(frozen=True)
class Workload:
    name: str
    quick: bool
    device: str

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens in a step."""
        return (2, 64) if self.quick else (8, 512)

    @property
    def counted(self) -> int:
        """Sequences of which the bytes kept for backward are counted; they are in proportion."""
        return 2

    @property
    def layers(self) -> int:
        return 2 if self.quick else 12

    def __str__(self) -> str:
        batch, tokens = self.shape
        return f"{model_name(self.quick, self.name)}, {batch}x{tokens} tokens"

    def model(self, subject: str, adapter: Path, layers: int | None = None) -> nn.Module:
        return SUBJECTS[subject](self.base(layers or self.layers), adapter).train()

    def base(self, layers: int) -> nn.Module:
        return MODELS[self.name](self.quick, use_cache=False, num_hidden_layers=layers).to(self.device)

    @property
    def tiny(self) -> Workload:
        return replace(self, quick=True)

    def is_too_slow(self, subject: str) -> bool:
        """Whether the subject does the short step alone, for its loss, and no peak of it is reported."""
        return subject in TOO_SLOW and self.device == "cpu" and not self.quick and not has_kernels(torch.bfloat16)

    def ids(self, vocabulary: int) -> Tensor:
        torch.manual_seed(2)
        return torch.randint(vocabulary, self.shape, device=self.device)


def status_mib(field: str) -> float:
    """A size from /proc/self/status: VmRSS is the resident memory now, VmHWM its highest so far."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak(device: str = "cpu") -> None:
    """Let the highest use of memory begin anew, from what is used now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    trim("cpu")
    Path("/proc/self/clear_refs").write_text("5")


def run_subject(subject: str, folder: Path, work: Workload) -> dict[str, Any]:
    """Two optimizer steps: peak memory in MiB, gross and net of the interpreter, losses, and ms of the second step.

    The first one has a single short sequence: it is there for the optimizer's state. What the same subject imports
    and sets up for a tiny model, which is trained before, is the interpreter's: no library's imports are another's.
    """
    cuda = work.device == "cuda"
    tiny = work.tiny
    train(tiny.model(subject, folder / TINY), tiny.ids(64)[:1, :16])
    forget_peak(work.device)
    interpreter = 0.0 if cuda else status_mib("VmRSS")
    model = work.model(subject, folder / str(work.layers))
    forget_peak(work.device)  # a model is made here in float32, and loaded in other ways
    weights = base_bytes(model) / MIB
    ids = work.ids(model.config.vocab_size)
    losses, elapsed = train(model, *[ids[:1, :16]] if work.is_too_slow(subject) else [ids[:1, :16], ids])
    gross = torch.cuda.max_memory_allocated() / MIB if cuda else status_mib("VmHWM")
    times = {"second step": elapsed}
    return {"gross": gross, "net": gross - interpreter, "base weights": weights, "losses": losses, **times}


def train(model: nn.Module, *batches: Tensor) -> tuple[list[float], float]:
    """A step of AdamW on each batch: the losses, and the ms of the last step."""
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    losses, elapsed = [], 0.0
    for ids in batches:
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        elapsed = 1e3 * (time.perf_counter() - start)
    return losses, elapsed


def in_fresh_process(subject: str, folder: Path, work: Workload) -> dict[str, Any]:
    """What `run_subject` says in a process of its own: a new interpreter, or to try things out a fork of this one."""
    context = multiprocessing.get_context("fork" if work.quick and work.device == "cpu" else "spawn")
    with context.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as process:
        report = process.apply(run_subject, (subject, folder, work))
    print(f"{work}, {subject}: {report}", flush=True)
    return report


def check_losses(reports: dict[str, dict[str, Any]]) -> None:
    """Subjects that do not compute the same are not compared."""
    for subject in filter(is_lora, reports):
        pairs = zip(reports[subject]["losses"], reports[peer(subject)]["losses"], strict=False)
        for step, (loss, expected) in enumerate(pairs):
            if not math.isclose(loss, expected, rel_tol=LOSS_TOLERANCE[base_of(subject)]):
                raise SystemExit(f"{subject}: loss {loss} in step {step}, PEFT's is {expected}; nothing is reported")


def saved_for_backward(subject: str, adapter: Path, work: Workload) -> tuple[float, float]:
    """What one forward pass keeps: all of it in MiB, and what a further block adds, in u.

    u is one array of a float32 for each token and feature of the residual stream. The embedding and the loss are in
    the total, but not in the difference of two models of which one has a block less.
    """
    counts = []
    for layers in (work.layers, work.layers - 1):
        model = work.model(subject, adapter / str(layers), layers)
        ids = work.ids(model.config.vocab_size)[: work.counted]
        counts.append(saved_bytes(forward(model, ids), model))
    u = 4 * ids.numel() * model.config.hidden_size
    return counts[0] / MIB, (counts[0] - counts[1]) / u


def forward(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: model(input_ids=ids, labels=ids).loss


def peak_rows(reports: dict[str, dict[str, Any]], work: Workload) -> list[Row]:
    kind = "allocated" if work.device == "cuda" else "resident"
    measures = [("net", f"peak {kind} memory, net", "MiB"), ("gross", f"peak {kind} memory, gross", "MiB")]
    rows = []
    for key, measure, unit in [
        *measures,
        ("base weights", "base weights", "MiB"),
        ("second step", "second step", "ms"),
    ]:
        for subject in reports:
            for other in compared_with(subject, reports):
                values = [reports[subject][key]], [reports[other][key]]
                rows.append(compare("memory", str(work), measure, unit, *values, other, subject))
    return rows


def compared_with(subject: str, measured: Iterable[str]) -> list[str]:
    """PEFT and full fine-tuning in float32, and both on the subject's own kind of base, as far as they were measured."""
    others = (PEFT, FULL, PEFT + base_of(subject), FULL + base_of(subject).replace("NF4 and ", ""))
    return [other for other in dict.fromkeys(others) if other in measured]


def saved_rows(counts: dict[str, tuple[float, float]], work: Workload) -> list[Row]:
    rows = []
    for index, (measure, unit) in enumerate((("kept for backward", "MiB"), ("kept for backward, a block", "u"))):
        for subject, count in counts.items():
            values = [count[index]], [counts[PEFT][index]]
            case = f"{model_name(work.quick, work.name)}, {work.counted}x{work.shape[1]} tokens"
            rows.append(compare("memory", case, measure, unit, *values, PEFT, subject))
    return rows


def measure(work: Workload) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for layers in (work.layers, work.layers - 1):
            save_adapter(work.base(layers), Path(folder) / str(layers))
        save_adapter(work.tiny.base(work.tiny.layers), Path(folder) / TINY)
        subjects = QUICK if work.quick else COMPARED
        reports = {subject: in_fresh_process(subject, Path(folder), work) for subject in subjects}
        check_losses(reports)
        whole_steps = {subject: report for subject, report in reports.items() if not work.is_too_slow(subject)}
        counts = {subject: saved_for_backward(subject, Path(folder), work) for subject in whole_steps}
    return peak_rows(whole_steps, work) + saved_rows(counts, work)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, nothing written without --output")
    parser.add_argument("--model", action="append", choices=MODELS, help="may be given twice; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="default: 2; --quick takes 1")
    parser.add_argument("--output", type=Path, help="folder for the rows and the plot; default: benchmarks/results")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1 if args.quick else args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes started below
    names = args.model or MODELS
    rows = [row for name in names for row in measure(Workload(name, args.quick, args.device))]
    for row in rows:
        show(on_device(row, args.device))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        print(write_rows("memory" + ("_cuda" if args.device == "cuda" else ""), rows, folder))
        plots.draw(folder)


if __name__ == "__main__":
    main()
