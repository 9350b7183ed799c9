"""``torch.compile``: graphs, step time and what is kept, of the frozen base, PEFT and ours, compiled and not: a part of speed.py.

A compiled subject is called as it is in the other rows and once more through ``torch.compile``; the two share their weights.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from options import Options, quietly, refused
from rows import Row, Rows, compare
from saved import saved_bytes
from step import GRADIENT_TOLERANCE, check_steps, training_steps
from subjects import CORE, FROZEN, LEAN, MODELS, PEFT, SUBJECTS, TUNED, model_name, save_adapter
from torch import Tensor, nn
from torch._dynamo.utils import counters

COMPILED = ", compiled"
SUBJECTS_HERE = (FROZEN, PEFT, TUNED, CORE, LEAN)
LENGTHS = (1.0, 0.75, 0.5)  # of the batches that a compiled subject is given, before it is timed on the first
Step = Callable[[], Tensor]


def backend(quick: bool) -> str:
    """torch's own compiler, if there is a C++ compiler for it to use; tried out, the graphs run as they are."""
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    return "inductor" if has_compiler and not quick else "aot_eager"


def compiled_steps(models: dict[str, nn.Module], ids: Tensor, quick: bool) -> tuple[dict[str, Step], dict[str, Any]]:
    """A step of each model through ``torch.compile``, and how many breaks and graphs all lengths together gave."""
    steps: dict[str, Step] = {}
    counts: dict[str, Any] = {}
    for name, model in models.items():
        torch._dynamo.reset()
        counters.clear()
        both = {FROZEN: models[FROZEN], name: torch.compile(model, backend=backend(quick))}
        for share in LENGTHS[::-1]:
            shorter = ids[:, : int(share * ids.shape[1])].contiguous()  # strides as batches have
            steps[name] = training_steps(both, shorter)[name]
            steps[name]()
            model.zero_grad(set_to_none=True)
        breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        counts[name] = {"graph breaks": breaks, "graphs for three lengths": graphs}
    return steps, counts


def counted(case: str, measure: str, subject: str, ours: int, peer: int, peer_name: str) -> Row:
    """A row of counts, which may be 0."""
    ratio = 1.0 if ours == peer else ours / peer if peer else math.inf
    return Row("speed_compile", case, measure, "", ours, peer, *[ratio] * 3, 1, peer_name, subject=subject)


def measured(name: str, models: dict[str, nn.Module], batch: int, tokens: int, options: Options) -> Rows | None:
    case = f"{model_name(options.quick, name)}, {batch}x{tokens} tokens, {backend(options.quick)}"
    ids = torch.randint(models[FROZEN].config.vocab_size, (batch, tokens), device=options.device)
    steps = training_steps(models, ids)
    through, counts = compiled_steps(models, ids, options.quick)
    for some in (steps, through):
        check_steps(models, {**some, PEFT: steps[PEFT]}, GRADIENT_TOLERANCE[options.dtype])
    steps |= {subject + COMPILED: step for subject, step in through.items()}

    def clean_up() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    times = options.race(steps, options.rounds_or(5), FROZEN, clean_up=clean_up)
    if times is None:
        return refused(case)
    kept = {n: [saved_bytes(step, models[n.removesuffix(COMPILED)]) / 2**20] for n, step in steps.items()}
    rows = []
    for subject in steps:
        peer = PEFT + COMPILED if subject.endswith(COMPILED) else PEFT
        rows.append(compare("speed_compile", case, "training step", "ms", times[subject], times[peer], peer, subject))
        rows.append(
            compare("speed_compile", case, "kept for backward", "MiB", kept[subject], kept[peer], peer, subject)
        )
    for subject in models:
        pairs = [(what, count, counts[PEFT][what]) for what, count in counts[subject].items()]
        rows += [counted(case, what, subject + COMPILED, *both, PEFT + COMPILED) for what, *both in pairs]
    return rows


def compile_part(options: Options) -> Iterator[Rows | None]:
    subjects = (FROZEN, PEFT, LEAN) if options.quick else SUBJECTS_HERE
    for name, make in list(MODELS.items())[-1:] if options.quick else MODELS.items():
        with tempfile.TemporaryDirectory() as folder, quietly():
            adapter = save_adapter(make(options.quick), Path(folder))
            base = options.place(make(options.quick, use_cache=False))
            models = {subject: SUBJECTS[subject](copy.deepcopy(base), adapter).train() for subject in subjects}
        yield measured(name, models, *((2, 32) if options.quick else (4, 256)), options)
