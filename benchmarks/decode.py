"""Greedy generation, one token at a time, over the plain base: a part of speed.py."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from options import Options, hold_against, output, quietly, refused
from rows import Rows, compare
from subjects import CORE, MODELS, PEFT, SUBJECTS, model_name, save_adapter
from torch import Tensor, nn

import minipeft


def decode_part(options: Options) -> Iterator[Rows | None]:
    for dtype in dict.fromkeys((torch.float32, options.dtype)):
        for name in MODELS:
            models = decode_models(name, dtype, options)
            for batch in (1, 8):
                yield measured(name, models, batch, dtype, options)


def decode_models(name: str, dtype: torch.dtype, options: Options) -> dict[str, nn.Module]:
    make = MODELS[name]
    base = options.place(make(options.quick)).to(dtype).eval()
    with tempfile.TemporaryDirectory() as folder, quietly():
        adapter = save_adapter(make(options.quick), Path(folder))
        theirs, ours = (SUBJECTS[subject](copy.deepcopy(base), adapter).eval() for subject in (PEFT, CORE))
        merged = minipeft.load_adapter(copy.deepcopy(base), adapter).merge_and_unload().eval()
    return {"base": base, PEFT: theirs, CORE: ours, "minipeft, merged": merged}


def measured(name: str, models: dict[str, nn.Module], batch: int, dtype: torch.dtype, options: Options) -> Rows | None:
    prompt, new_tokens = 16, 2 if options.quick else 64
    ids = torch.randint(models["base"].config.vocab_size, (batch, prompt), device=options.device)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def call(model: nn.Module) -> Callable[[], Tensor]:
        whole = torch.ones_like(ids)
        return lambda: model.generate(
            input_ids=ids, attention_mask=whole, do_sample=False, use_cache=True, pad_token_id=0, **length
        )

    calls = {name: call(model) for name, model in models.items()}
    if dtype is not torch.float32:  # two nearly equal logits may change places
        hold_against(output(models[PEFT], ids), models[CORE], ids, tolerance=0.05)
    elif not torch.equal(calls[PEFT](), calls[CORE]()):
        raise SystemExit("decode: ours and PEFT generate different tokens; no time is reported")
    case = f"{model_name(options.quick, name)}, {prompt} + {new_tokens} tokens, batch {batch}, {str(dtype).removeprefix('torch.')}"
    times = options.race(calls, options.rounds_or(20), "base")
    if times is None:
        return refused(case)
    pairs = [(subject, "base") for subject in models if subject != "base"] + [(CORE, PEFT)]
    return [compare("speed_decode", case, "greedy decoding", "ms", times[a], times[b], b, a) for a, b in pairs]
