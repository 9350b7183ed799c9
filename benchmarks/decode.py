"""Greedy generation, one token at a time, over the plain base: a part of speed.py."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from options import Options, quietly, refused
from rows import Rows, compare
from subjects import CORE, PEFT, SUBJECTS, gpt2, model_name, save_adapter
from torch import Tensor, nn

import minipeft


def decode_part(options: Options) -> Iterator[Rows | None]:
    prompt, new_tokens = 16, 8 if options.quick else 64
    base = options.place(gpt2(options.quick)).eval()
    with tempfile.TemporaryDirectory() as folder, quietly():
        adapter = save_adapter(gpt2(options.quick), Path(folder))
        theirs, ours = (SUBJECTS[name](copy.deepcopy(base), adapter).eval() for name in (PEFT, CORE))
        merged = minipeft.load_adapter(copy.deepcopy(base), adapter).merge_and_unload().eval()
    models = {"base": base, PEFT: theirs, CORE: ours, "minipeft, merged": merged}
    ids = torch.randint(base.config.vocab_size, (1, prompt), device=options.device)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def call(model: nn.Module) -> Callable[[], Tensor]:
        whole = torch.ones_like(ids)
        return lambda: model.generate(
            input_ids=ids, attention_mask=whole, do_sample=False, use_cache=True, pad_token_id=0, **length
        )

    calls = {name: call(model) for name, model in models.items()}
    if not torch.equal(calls[PEFT](), calls[CORE]()):
        raise SystemExit("decode: ours and PEFT generate different tokens; no time is reported")
    case = f"{model_name(options.quick)}, {prompt} + {new_tokens} tokens, batch 1"
    times = options.race(calls, options.rounds_or(20), "base")
    if times is None:
        yield refused(case)
        return
    pairs = [(name, "base") for name in models if name != "base"] + [(CORE, PEFT)]
    yield [compare("speed_decode", case, "greedy decoding", "ms", times[a], times[b], b, a) for a, b in pairs]
