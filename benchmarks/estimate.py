"""Does ``minipeft estimate`` say what a step takes? Its peak next to the measured one, a fresh process for each.

    python benchmarks/estimate.py --measured rows.jsonl    # goes on where an earlier call stopped; an hour on two cores
    python benchmarks/estimate.py --gpu                    # the peaks in gpu_step.csv, which needs no GPU: ten minutes
    python benchmarks/estimate.py --quick

A row's "ours" is the estimate, its "peer" the measured peak: VmHWM from when the model was built, without what the
interpreter had before. docs/planning.md has the table.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import json
import multiprocessing
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import gpu
import torch
from memory import MIB, status_mib
from rows import RESULTS, Row, compare, show, write_rows
from subjects import (
    CORE,
    FULL,
    LEAN,
    LEAN_BLOCK,
    LEAN_MLP,
    LEAN_NONE,
    LEAN_SQRT,
    LLAMA_TARGETS,
    TARGETS,
    gpt2,
    llama,
)
from transformers import PreTrainedConfig, PreTrainedModel

import minipeft
from minipeft.testing.table import with_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
MARKS = "<!-- estimate: begin -->", "<!-- estimate: end -->"
GPU_MARKS = "<!-- estimate on a GPU: begin -->", "<!-- estimate on a GPU: end -->"
LEAN_WAYS = {LEAN_NONE: "none", LEAN: "last", LEAN_MLP: "mlp", LEAN_BLOCK: "block", LEAN_SQRT: "sqrt"}
MODELS = {"gpt2": (gpt2, TARGETS), "llama": (llama, LLAMA_TARGETS)}
LAYERS = 4
SHAPES = ((1, 128), (4, 256), (8, 512))
WAYS = ("full", "lora", "last", "block", "sqrt")
BASES: dict[str, tuple[str, str | None]] = {
    "fp32": ("float32", None),
    "nf4": ("float32", "nf4"),
    "bf16": ("bfloat16", None),
}


class Case(NamedTuple):
    """One way to train; `how` is "full", "lora", or what lean recomputes."""

    name: str
    how: str
    base: str
    batch: int
    length: int
    layers: int = LAYERS

    def __str__(self) -> str:
        return f"{self.name}, {self.layers} layers, {self.batch}x{self.length} tokens"

    @property
    def options(self) -> dict[str, Any]:
        """For `minipeft.estimate`."""
        dtype, quantize = BASES[self.base]
        lean = self.how not in ("full", "lora")
        way = {"training": "lean", "checkpointing": self.how} if lean else {"training": self.how}
        return {**way, "dtype": dtype, "quantize": quantize, "batch": self.batch, "length": self.length}


def model_of(case: Case, tiny: bool) -> PreTrainedModel:
    model = MODELS[case.name][0](tiny, use_cache=False, num_hidden_layers=case.layers)
    return model.to(torch.bfloat16) if case.base == "bf16" else model


@functools.cache
def config_of_model(name: str, layers: int, tiny: bool) -> PreTrainedConfig:
    return model_of(Case(name, "full", "fp32", 1, 1, layers), tiny).config


def measure(case: Case, tiny: bool) -> float:
    """Peak of the second of two steps in MiB, in this process, which must be fresh."""
    if BASES[case.base][1] is not None:
        importlib.import_module("bitsandbytes")  # the interpreter's, not the model's
    warnings.simplefilter("ignore")
    interpreter = status_mib("VmRSS")
    model = model_of(case, tiny)
    if BASES[case.base][1] is not None:
        minipeft.quantize(model, BASES[case.base][1] or "")
    model.train()
    if case.how != "full":
        model = minipeft.get_lora_model(model, config_of(case))
    if case.options["training"] == "lean":
        minipeft.lean(model, case.how)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # VmHWM begins anew: a model is loaded in other ways than it is made here
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    torch.manual_seed(2)
    ids = torch.randint(model.config.vocab_size, (case.batch, case.length))
    for some in (ids[:1, :16], ids):
        model(input_ids=some, labels=some).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return status_mib("VmHWM") - interpreter


def config_of(case: Case) -> minipeft.LoraConfig:
    return minipeft.LoraConfig(r=8, lora_alpha=8, target_modules=MODELS[case.name][1])


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("gpt2", "lora", "fp32", 2, 32, 2), Case("llama", "block", "nf4", 2, 32, 2)]
    every = [Case(name, how, base, *shape) for shape in SHAPES for base in BASES for name in MODELS for how in WAYS]
    return [case for case in every if case.base == "fp32" or case.how != "full"]


def known(path: Path | None) -> dict[Case, float]:
    """What earlier calls measured."""
    lines = path.read_text("utf-8").splitlines() if path is not None and path.exists() else []
    found = [json.loads(line) for line in lines]
    return {Case(d["name"], d["how"], d["base"], d["B"], d["T"], d["L"]): d["net"] for d in found}


def measured(case: Case, args: argparse.Namespace) -> float:
    context = multiprocessing.get_context("fork" if args.quick else "spawn")
    with context.Pool(1, torch.set_num_threads, (1,)) as process:
        net = process.apply(measure, (case, args.quick))
    if args.measured is not None:
        name, how, base, batch, length, layers = case
        row = {"name": name, "how": how, "base": base, "B": batch, "T": length, "L": layers, "net": round(net, 1)}
        with args.measured.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return net


def row_of(case: Case, net: float, tiny: bool) -> Row:
    found = minipeft.estimate(config_of_model(case.name, case.layers, tiny), config_of(case), **case.options)
    subject = f"{case.how}, {case.base}"
    row = compare("estimate", str(case), "peak memory of a step", "MiB", [found.peak / MIB], [net], "measured", subject)
    show(row)
    return row


def on_gpu(measured: dict[str, str]) -> Row | None:
    """The estimate of a peak that benchmarks/gpu.py measured, without what is no array; None for other libraries' peaks."""
    subject, name, kind, size = measured["subject"], *measured["case"].split(", ")
    training = {FULL: "full", CORE: "lora"}.get(subject, "lean")
    if training == "lean" and subject not in LEAN_WAYS:
        return None
    batch, length = map(int, size.removesuffix(" tokens").split("x"))
    adapter = minipeft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    options = {"dtype": "bfloat16", "quantize": "nf4" if kind.startswith("NF4") else None, "device": "cuda"}
    way = {"training": training} | ({"checkpointing": LEAN_WAYS[subject]} if training == "lean" else {})
    found = minipeft.estimate(gpu.SHAPES[name].config(), adapter, **options, **way, batch=batch, length=length)
    arrays, peak = (found.peak - found.memory["overhead"]) / MIB, float(measured["ours"])
    row = compare("estimate", measured["case"], "peak memory of a step", "MiB", [arrays], [peak], "measured", subject)
    row.device = measured["device"]
    show(row)
    return row


def gpu_rows() -> list[Row]:
    records = csv.DictReader((RESULTS / "gpu_step.csv").read_text("utf-8").splitlines())
    peaks = {(r["case"], r["subject"]): r for r in records if r["measure"].startswith("peak")}
    return [row for each in peaks.values() if (row := on_gpu(each)) is not None]


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| model | training, base | measured | estimated | error |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {row.case} | {row.subject} | {row.peer:,.0f} MiB | {row.ours:,.0f} MiB | {row.ratio - 1:+.1%} |"
        for row in rows
    ]
    errors = [abs(row.ratio - 1) for row in rows]
    mean = sum(errors) / len(errors)
    return "\n".join([*lines, "", f"{len(rows)} cases: the largest error is {max(errors):.1%}, the mean {mean:.1%}."])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, nothing written without --output")
    parser.add_argument("--gpu", action="store_true", help="next to the peaks that benchmarks/gpu.py measured")
    parser.add_argument("--measured", type=Path, help="file of measurements to go on from, and to add to")
    parser.add_argument("--only-measured", action="store_true", help="measure nothing more")
    parser.add_argument(
        "--output", type=Path, help="folder for the rows; default: benchmarks/results, and docs/planning.md"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes started below
    done = known(args.measured)
    wanted = [case for case in cases(args.quick) if case in done or not args.only_measured]
    if args.gpu:
        rows = gpu_rows()
    else:
        rows = [row_of(case, done[case] if case in done else measured(case, args), args.quick) for case in wanted]
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        print(write_rows("estimate_gpu" if args.gpu else "estimate", rows, folder))
    if args.output is None and not args.quick:
        marks = GPU_MARKS if args.gpu else MARKS
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), f"{table(rows)}\n", *marks), "utf-8")


if __name__ == "__main__":
    main()
