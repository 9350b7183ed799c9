"""How much memory: the peak of two training steps, a fresh process for each subject, and the bytes kept for backward.

    python benchmarks/memory.py                   # GPT-2 124M, 8 x 512 tokens, float32: needs 10 GiB free
    python benchmarks/memory.py --quick

The losses of all LoRA subjects must agree in both steps, and those on an NF4 base with one another, or nothing is
reported. On a processor with AVX512-BF16, bitsandbytes' own layers work as anywhere else here: nothing is evaluated.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plots
import torch
from rows import RESULTS, Row, compare, device_name, show, write_rows
from saved import saved_bytes
from subjects import (
    CORE,
    CORE_NF4,
    FULL,
    FULL_CHECKPOINTED,
    LEAN,
    LEAN_BLOCK,
    LEAN_MLP,
    LEAN_NF4,
    PEFT,
    PEFT_CHECKPOINTED,
    PEFT_NF4,
    QUANTIZED,
    SUBJECTS,
    TUNED,
    base_bytes,
    gpt2,
    is_lora,
    model_name,
    peer,
    save_adapter,
)
from torch import Tensor, nn

MIB = 2**20
LOSS_TOLERANCE = 1e-4  # relative
COMPARED = (FULL, PEFT, TUNED, PEFT_CHECKPOINTED, CORE, LEAN, LEAN_MLP, LEAN_BLOCK, FULL_CHECKPOINTED)
COMPARED += (PEFT_NF4, CORE_NF4, LEAN_NF4)
QUICK = (FULL, PEFT, LEAN_BLOCK, PEFT_NF4, CORE_NF4)


@dataclass(frozen=True)
class Workload:
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
        return f"{model_name(self.quick)}, {batch}x{tokens} tokens, float32"

    def model(self, subject: str, adapter: Path, layers: int | None = None) -> nn.Module:
        base = gpt2(self.quick, use_cache=False, n_layer=layers or self.layers).to(self.device)
        return SUBJECTS[subject](base, adapter).train()

    def ids(self, vocabulary: int) -> Tensor:
        torch.manual_seed(2)
        return torch.randint(vocabulary, self.shape, device=self.device)


def status_mib(field: str) -> float:
    """A size from /proc/self/status: VmRSS is the resident memory now, VmHWM its highest so far."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def run_subject(subject: str, adapter: Path, work: Workload) -> dict[str, Any]:
    """Two optimizer steps: peak memory in MiB, gross and net of the interpreter, losses, and ms of the second step."""
    cuda = work.device == "cuda"
    if subject in QUANTIZED:
        importlib.import_module("bitsandbytes")  # the interpreter's, not the model's
    interpreter = 0.0 if cuda else status_mib("VmRSS")
    model = work.model(subject, adapter)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    weights = base_bytes(model) / MIB
    ids, losses, elapsed = work.ids(model.config.vocab_size), [], 0.0
    for _ in range(2):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        elapsed = 1e3 * (time.perf_counter() - start)
    gross = torch.cuda.max_memory_allocated() / MIB if cuda else status_mib("VmHWM")
    times = {"second step": elapsed}
    return {"gross": gross, "net": gross - interpreter, "base weights": weights, "losses": losses, **times}


def in_fresh_process(subject: str, adapter: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What `run_subject` says in a process of its own: a new interpreter, or to try things out a fork of this one."""
    context = multiprocessing.get_context("fork" if args.quick and args.device == "cpu" else "spawn")
    with context.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as process:
        report = process.apply(run_subject, (subject, adapter, Workload(args.quick, args.device)))
    print(f"{subject}: {report}", flush=True)
    return report


def check_losses(reports: dict[str, dict[str, Any]]) -> None:
    """Subjects that do not compute the same are not compared."""
    for subject in filter(is_lora, reports):
        pairs = zip(reports[subject]["losses"], reports[peer(subject)]["losses"], strict=True)
        for step, (loss, expected) in enumerate(pairs):
            if not math.isclose(loss, expected, rel_tol=LOSS_TOLERANCE):
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
    u = 4 * ids.numel() * model.config.n_embd
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
        for other in (PEFT, FULL, PEFT_NF4):
            for subject in reports:
                if other != PEFT_NF4 or peer(subject) == PEFT_NF4:
                    values = [reports[subject][key]], [reports[other][key]]
                    rows.append(compare("memory", str(work), measure, unit, *values, other, subject))
    return rows


def saved_rows(counts: dict[str, tuple[float, float]], work: Workload) -> list[Row]:
    rows = []
    for index, (measure, unit) in enumerate((("kept for backward", "MiB"), ("kept for backward, a block", "u"))):
        for subject, count in counts.items():
            values = [count[index]], [counts[PEFT][index]]
            case = f"{model_name(work.quick)}, {work.counted}x{work.shape[1]} tokens, float32"
            rows.append(compare("memory", case, measure, unit, *values, PEFT, subject))
    return rows


def measure(args: argparse.Namespace) -> list[Row]:
    work = Workload(args.quick, args.device)
    with tempfile.TemporaryDirectory() as folder:
        for layers in (work.layers, work.layers - 1):
            save_adapter(gpt2(work.quick, n_layer=layers), Path(folder) / str(layers))
        whole = Path(folder) / str(work.layers)
        subjects = QUICK if args.quick else COMPARED
        reports = {subject: in_fresh_process(subject, whole, args) for subject in subjects}
        check_losses(reports)
        counts = {subject: saved_for_backward(subject, Path(folder), work) for subject in subjects}
    return peak_rows(reports, work) + saved_rows(counts, work)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, nothing written without --output")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="default: 2; --quick takes 1")
    parser.add_argument("--output", type=Path, help="folder for the rows and the plot; default: benchmarks/results")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1 if args.quick else args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes started below
    rows = measure(args)
    for row in rows:
        row.device = device_name(args.device)
        show(row)
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        print(write_rows("memory" + ("_cuda" if args.device == "cuda" else ""), rows, folder))
        plots.draw(folder)


if __name__ == "__main__":
    main()
