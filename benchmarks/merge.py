"""`merge_and_unload`, next to PEFT's plain and checked ones: a part of speed.py."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from options import Options, hold_against, output, quietly, refused
from rows import Rows, compare
from subjects import CORE, MODELS, PEFT, SUBJECTS, model_name, save_adapter
from timing import MAX_DRIFT, drift, timed
from torch import nn

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


def merge_part(options: Options) -> Iterator[Rows | None]:
    for dtype in (torch.float32, torch.bfloat16):
        for name in MODELS:
            yield measured(name, dtype, options)


def measured(name: str, dtype: torch.dtype, options: Options) -> Rows | None:
    make = MODELS[name]
    base = options.place(make(options.quick)).to(dtype).eval()
    x = torch.arange(32, device=options.device)[None]
    with tempfile.TemporaryDirectory() as folder, quietly():
        adapter = save_adapter(make(options.quick), Path(folder))
        models = {subject: SUBJECTS[subject](copy.deepcopy(base), adapter).eval() for subject in (PEFT, CORE)}
    expected = output(models[PEFT], x)
    verbs: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
        CORE: (CORE, lambda model: model.merge_and_unload()),
        PEFT: (PEFT, lambda model: model.merge_and_unload()),
        "PEFT, safe_merge=True": (PEFT, lambda model: model.merge_and_unload(safe_merge=True)),
    }
    times: dict[str, list[float]] = {name: [] for name in verbs}
    rounds, warm_ups = options.rounds_or(20), 0 if options.quick else 2
    for index in range(warm_ups + rounds):
        for key, (subject, verb) in list(verbs.items())[:: 1 if index % 2 else -1]:
            twin = copy.deepcopy(models[subject])
            elapsed, merged = timed(functools.partial(verb, twin), options.device)
            hold_against(expected, merged, x, TOLERANCE[dtype])
            if index >= warm_ups:
                times[key].append(elapsed)
    case = f"{model_name(options.quick, name)}, {str(dtype).removeprefix('torch.')}"
    if not options.force and drift(times[PEFT]) > MAX_DRIFT:
        return refused(case)
    peers = [key for key in verbs if key != CORE]
    return [compare("speed_merge", case, "merge_and_unload", "ms", times[CORE], times[peer], peer) for peer in peers]
