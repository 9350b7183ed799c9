"""A batch whose rows use different adapters, and adapters trained in one batch: a part of speed.py."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from options import Options, quietly, refused
from rows import Rows, compare
from subjects import CORE, LLAMA_TARGETS, PEFT, TARGETS, gpt2, model_name
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import minipeft

BENCHMARK = "speed_many"
BASE = "base"
ONE = "minipeft, one adapter"
TURNS = "minipeft, one after the other"
RANK = 8


def many_part(options: Options) -> Iterator[Rows | None]:
    for name, base, targets in bases(options):
        for count, length in ((4, 8),) if options.quick else ((8, 64), (64, 8)):
            yield from serving(options, name, base, targets, count, length)
        yield training(options, name, base, targets, 3 if options.quick else 8)


def bases(options: Options) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """(name, model, target modules) of what is measured."""
    yield model_name(options.quick), options.place(gpt2(options.quick)).eval(), TARGETS
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
    if options.quick:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=101 if options.quick else 32000)
    name = "tiny Llama" if options.quick else "Llama 154M without embeddings"
    yield name, options.place(LlamaForCausalLM(config)).eval(), LLAMA_TARGETS


def both(base: nn.Module, targets: list[str], count: int) -> tuple[nn.Module, minipeft.AdaptedModel, list[str]]:
    """PEFT's model and ours with the same adapters, and their names."""
    names = [f"a{index}" for index in range(count)]
    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder, quietly():
        options = peft.LoraConfig(**config, init_lora_weights=False, fan_in_fan_out=targets == TARGETS)
        theirs = peft.get_peft_model(copy.deepcopy(base), options, names[0])
        for name in names[1:]:
            theirs.add_adapter(name, options)
        theirs.save_pretrained(folder)
        ours: Any = copy.deepcopy(base)
        for name in names:
            ours = minipeft.load_adapter(ours, Path(folder) / name, name, is_trainable=True)
    return theirs.eval(), ours.eval(), names


def serving(
    options: Options, model: str, base: nn.Module, targets: list[str], count: int, length: int
) -> Iterator[Rows | None]:
    """One forward pass, and greedy decoding, with another adapter for each row."""
    theirs, ours, names = both(base, targets, count)
    ids = torch.randint(base.config.vocab_size, (count, length), device=options.device)
    new = {"max_new_tokens": 4 if options.quick else 16 if count == 8 else 8, "do_sample": False, "pad_token_id": 0}
    new |= {"min_new_tokens": new["max_new_tokens"], "attention_mask": torch.ones_like(ids)}

    def forward(subject: nn.Module, **more: Any) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                found: Tensor = subject(input_ids=ids, **more).logits
            return found

        return call

    def decode(subject: Any, **more: Any) -> Callable[[], Tensor]:
        return lambda: subject.generate(input_ids=ids, **new, **more)

    case = f"{model}, {count} adapters, {count} x {length} tokens"
    for measure, way in (("one forward pass", forward), (f"{new['max_new_tokens']} tokens decoded", decode)):
        calls = {
            PEFT: way(theirs, adapter_names=names),
            CORE: way(ours, adapter_names=names),
            ONE: way(ours),
            BASE: way(base),
        }
        torch.testing.assert_close(calls[CORE](), calls[PEFT](), rtol=1e-3, atol=1e-3)
        yield race(options, case, measure, calls, ((CORE, PEFT), (CORE, ONE), (CORE, BASE), (BASE, PEFT)))


def training(options: Options, model: str, base: nn.Module, targets: list[str], count: int) -> Rows | None:
    """A step of every adapter on a row of its own: together, one after the other, and of one adapter on all rows."""
    _, ours, names = both(base, targets, count)
    length = 8 if options.quick else 128
    ids = torch.randint(base.config.vocab_size, (count, length), device=options.device)
    models = {name: copy.deepcopy(ours).train() for name in (CORE, ONE, TURNS)}
    together, one, turns = models.values()
    together.train_adapters(names)
    turns.train_adapters(names)

    def step_together() -> None:
        logits = together(ids, adapter_names=names).logits
        sum(minipeft.per_adapter_loss(logits, ids, names).values()).backward()

    def step_one() -> None:
        one(ids, labels=ids).loss.backward()

    def step_turns() -> None:
        for row, name in enumerate(names):
            turns.set_adapter(name)
            turns(ids[row : row + 1], labels=ids[row : row + 1]).loss.backward()

    def clean_up() -> None:
        for each in models.values():
            each.zero_grad()

    step_together(), step_turns()
    for name in names:
        pairs = zip(together.adapter_parameters(name), turns.adapter_parameters(name), strict=True)
        for mine, alone in pairs:
            torch.testing.assert_close(mine.grad, alone.grad, rtol=1e-3, atol=1e-5)
    clean_up()
    case = f"{model}, {count} adapters, {count} x 1 rows of {length} tokens"
    calls = {CORE: step_together, ONE: step_one, TURNS: step_turns}
    return race(options, case, "forward and backward", calls, ((CORE, ONE), (CORE, TURNS)), clean_up=clean_up)


def race(
    options: Options,
    case: str,
    measure: str,
    calls: dict[str, Callable[[], Any]],
    pairs: tuple[tuple[str, str], ...],
    **more: Any,
) -> Rows | None:
    """Rows of the pairs, each a subject and the one that it is divided by; the first pair's other is the reference."""
    times = options.race(calls, options.rounds_or(10), pairs[0][1], warm_ups=1, **more)
    if times is None:
        refused(case)
        return None
    return [compare(BENCHMARK, case, measure, "ms", times[one], times[other], other, one) for one, other in pairs]
