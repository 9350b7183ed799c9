"""Short examples in packed rows, next to the same examples padded: a part of speed.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from options import Options, quietly, refused
from rows import Rows, compare
from subjects import LEAN, SUBJECTS, gpt2, model_name, save_adapter
from torch import nn

from minipeft.training.data.collate import Batch, Example, collate
from minipeft.training.data.examples import Examples
from minipeft.training.data.packing import pack
from minipeft.training.updates import loss_sum

AS_THEY_COME, BY_LENGTH, PACKED = "padded as they come", "padded, sorted by length", "packed"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the sum of the losses, relative


def examples_of(count: int, longest: int, vocabulary: int) -> list[Example]:
    """Random examples. Most are short: their lengths are spread evenly on a logarithmic scale, as those of chats are."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.uniform(np.log(8), np.log(longest), count)).astype(int)
    ids = [generator.integers(vocabulary, size=length).astype(np.int32) for length in lengths]
    return [Example(row, row) for row in ids]


def batches_of(examples: Sequence[Example], size: int) -> list[Batch]:
    return [collate(examples[start : start + size], 0) for start in range(0, len(examples), size)]


def passes(model: nn.Module, batches: Sequence[Batch], device: str) -> Callable[[], float]:
    """Forward and backward pass over some batches; returns the sum of the losses."""
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]

    def call() -> float:
        total = 0.0
        for batch in batches:
            loss = loss_sum(model, batch)
            loss.backward()
            total += loss.item()
        return total

    return call


def packing_part(options: Options) -> Iterator[Rows | None]:
    with tempfile.TemporaryDirectory() as folder, quietly():
        base = options.place(gpt2(options.quick, use_cache=False))
        model = SUBJECTS[LEAN](base, save_adapter(gpt2(options.quick), Path(folder))).train()
    count, longest, rows = (24, 32, 64) if options.quick else (32, 256, 512)
    examples = examples_of(count, longest, model.config.vocab_size)
    packed = pack(Examples.in_memory(examples, pad_id=0, max_length=rows))
    packed, tokens = packed.rows(range(len(packed))), sum(len(example.labels) for example in examples)
    by_length = sorted(examples, key=lambda example: len(example.labels))
    # As many tokens at a time as `size` examples have: packed batches have fewer rows, which are full.
    size = 8
    together = max(1, round(len(packed) * size / count))
    calls = {AS_THEY_COME: batches_of(examples, size), BY_LENGTH: batches_of(by_length, size)}
    calls |= {PACKED: batches_of(packed, together)}
    case = f"{model_name(options.quick)}, {count} examples of 8 to {longest} tokens in rows of {rows}"
    yield race(case, tokens, {name: passes(model, own, options.device) for name, own in calls.items()}, model, options)


def race(
    case: str, tokens: int, calls: dict[str, Callable[[], float]], model: nn.Module, options: Options
) -> Rows | None:
    losses = {name: call() for name, call in calls.items()}
    for name, loss in losses.items():
        if not abs(loss / losses[PACKED] - 1) <= TOLERANCE[options.dtype]:
            raise SystemExit(f"{name}: the loss is {loss}, packed {losses[PACKED]}; no time is reported")
    rounds = options.rounds_or(10)
    times = options.race(calls, rounds, AS_THEY_COME, clean_up=lambda: model.zero_grad(set_to_none=True))
    if times is None:
        return refused(case)
    rates = {name: [1e3 * tokens / time for time in own] for name, own in times.items()}
    return [
        compare("speed_packing", case, "forward and backward", "tokens/s", rates[PACKED], rates[peer], peer, PACKED)
        for peer in (AS_THEY_COME, BY_LENGTH)
    ]
