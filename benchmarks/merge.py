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
from subjects import CORE, PEFT, SUBJECTS, gpt2, model_name, save_adapter
from timing import MAX_DRIFT, drift, timed
from torch import nn


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
            elapsed, merged = timed(functools.partial(verb, twin), options.device)
            hold_against(expected, merged, x)
            if index >= 2:
                times[name].append(elapsed)
    case = model_name(options.quick)
    if not options.force and drift(times[PEFT]) > MAX_DRIFT:
        yield refused(case)
        return
    peers = [name for name in verbs if name != CORE]
    yield [compare("speed_merge", case, "merge_and_unload", "ms", times[CORE], times[peer], peer) for peer in peers]
