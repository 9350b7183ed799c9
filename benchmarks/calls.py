"""What a step costs besides arithmetic, with narrow blocks and few tokens, so that Python takes nearly all: a part of speed.py.

A GPU waits for this work whenever its own is short: small models, short batches, a slow processor.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from options import Options, quietly, refused
from rows import Rows, compare
from step import GRADIENT_TOLERANCE, check_steps, training_steps
from subjects import CORE, FROZEN, FULL, LEAN, LEAN_NONE, MODELS, PEFT, SUBJECTS, save_adapter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SUBJECTS_HERE = (FROZEN, FULL, PEFT, CORE, LEAN_NONE, LEAN)
NARROW: dict[str, dict[str, Any]] = {
    "GPT-2 124M": {"n_embd": 64, "n_head": 4, "vocab_size": 128},
    "Llama 134M": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}
LAYERS = {"GPT-2 124M": "n_layer", "Llama 134M": "num_hidden_layers"}


class Counted(TorchDispatchMode):
    """Counts the operations that do work: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


def operations(step: Callable[[], Tensor]) -> list[float]:
    with Counted() as counted:
        step()
    return [float(counted.count)]


def calls_part(options: Options) -> Iterator[Rows | None]:
    for name, make in MODELS.items():
        blocks = 6 if options.quick else 12
        sizes = NARROW[name] | {LAYERS[name]: blocks, "bos_token_id": 0, "eos_token_id": 0}

        def narrow(sizes: dict[str, Any] = sizes, make: Callable[..., nn.Module] = make) -> nn.Module:
            return make(**sizes, use_cache=False)

        with tempfile.TemporaryDirectory() as folder, quietly():
            adapter, base = save_adapter(narrow(), Path(folder)), options.place(narrow())
            models = {subject: SUBJECTS[subject](copy.deepcopy(base), adapter).train() for subject in SUBJECTS_HERE}
        yield measured(f"{name.split()[0]} of {blocks} narrow blocks, 2x8 tokens", models, options)


def measured(case: str, models: dict[str, nn.Module], options: Options) -> Rows | None:
    ids = torch.randint(models[FROZEN].config.vocab_size, (2, 8), device=options.device)
    steps = training_steps(models, ids)
    check_steps(models, steps, GRADIENT_TOLERANCE[options.dtype])

    def clean_up() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    counts = {subject: operations(step) for subject, step in steps.items()}
    clean_up()
    times = options.race(steps, options.rounds_or(60), FROZEN, clean_up=clean_up)
    if times is None:
        return refused(case)
    rows = []
    for subject in models:
        rows.append(compare("speed_calls", case, "training step", "ms", times[subject], times[PEFT], PEFT, subject))
        rows.append(compare("speed_calls", case, "operations", "", counts[subject], counts[PEFT], PEFT, subject))
    return rows
