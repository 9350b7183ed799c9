"""Out of memory: what each remedy saves, and what it costs.

    python examples/tutorial/08_out_of_memory.py

A GPT-2 of 2.6 million parameters with random weights takes a training step in many ways. For each, the most bytes that were
alive at once, counted array by array as in chapter 1, and how often each block was computed.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import NamedTuple

import torch
from material import check, figure, options, save
from transformers import GPT2Config, GPT2LMHeadModel

from minipeft import LoraConfig, get_lora_model, lean, quantize

Peak = import_module("01_why_lora").Peak


class Way(NamedTuple):
    """How a step is made: what is done to the model, rows in a pass, passes in a step, and autocast."""

    name: str
    prepare: Callable
    rows: int
    passes: int = 1
    autocast: bool = False


def lora(model):
    return get_lora_model(model, LoraConfig(r=8, target_modules="all-linear"))


def ways(rows: int) -> list[Way]:
    return [
        Way("full fine-tuning", lambda model: model, rows),
        Way("LoRA", lora, rows),
        Way("a quarter of the batch, 4 passes", lora, rows // 4, 4),
        Way("mixed precision (autocast)", lora, rows, autocast=True),
        Way("base in bfloat16", lambda model: lora(model.bfloat16()), rows),
        Way("lean", lambda model: lean(lora(model)), rows),
        Way("lean, recompute blocks", lambda model: lean(lora(model), "block"), rows),
        Way("the same on NF4", lambda model: lean(lora(quantize(model)), "block"), rows),
        Way("the same, a quarter, 4 passes", lambda model: lean(lora(quantize(model)), "block"), rows // 4, 4),
    ]


def model_of(quick: bool):
    torch.manual_seed(0)
    sizes = (
        {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512}
        if quick
        else {"n_layer": 4, "n_embd": 192, "n_head": 4}
    )
    drops = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    config = GPT2Config(
        **{"vocab_size": 4096, **sizes}, **drops, n_positions=256, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def measured(way: Way, ids: torch.Tensor, quick: bool):
    """Bytes that are always held, the most at once, the gradients of the first step, and calls of a block in a pass."""
    model = way.prepare(model_of(quick)).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    calls: list[int] = []
    model.transformer.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    first = {}
    for _ in range(2):  # the first step makes the optimizer's averages
        averages = [value for state in optimizer.state.values() for value in state.values()]
        held = {t.untyped_storage()._cdata: t.nbytes for t in [*model.parameters(), *model.buffers(), *averages]}
        calls.clear()
        with Peak(sum(held.values())) as peak:
            for part in ids.split(way.rows):
                with torch.autocast("cpu", torch.bfloat16) if way.autocast else nullcontext():
                    loss = model(part.clone(), labels=part.clone()).loss / way.passes
                loss.backward()
            first = first or {name: parameter.grad.clone() for name, parameter in trained.items()}
            optimizer.step()
            optimizer.zero_grad()
    return sum(held.values()), peak.most, first, len(calls) / way.passes


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    rows, length = (4, 16) if args.quick else (8, 128)
    ids = torch.randint(500, (rows, length), generator=torch.Generator().manual_seed(1))
    chosen = [way for place, way in enumerate(ways(rows)) if not args.quick or place in (0, 1, 2, 6)]
    results = {way.name: measured(way, ids, args.quick) for way in chosen}
    print(f"one step of AdamW on {rows} x {length} tokens; megabytes of 1,000,000 bytes")
    print(f"{'':34}{'always held':>12}{'at the peak':>12}{'a block is computed':>21}")
    for name, (held, most, _, calls) in results.items():
        print(f"{name:34}{held / 1e6:>12.1f}{most / 1e6:>12.1f}{calls:>17.3g} x")

    peak = {name: most for name, (_, most, _, _) in results.items()}
    whole, parts = results["LoRA"][2], results["a quarter of the batch, 4 passes"][2]
    check(
        "four passes over a quarter each give the gradient of the whole batch",
        all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole),
    )
    check("the smaller batch needs less", peak["a quarter of the batch, 4 passes"] < peak["LoRA"])
    check("LoRA holds less than half of full fine-tuning", 2 * results["LoRA"][0] < results["full fine-tuning"][0])
    block, full = results["lean, recompute blocks"], results["full fine-tuning"]
    same = all(torch.allclose(whole[name], block[2][name], atol=1e-5) for name in whole)
    check("recomputing changes no gradient", same)
    if not args.quick:
        check(
            f"bfloat16 takes {peak['base in bfloat16'] / peak['LoRA']:.0%} of LoRA's peak",
            peak["base in bfloat16"] < 0.7 * peak["LoRA"],
        )
        check(f"lean takes {peak['lean'] / peak['LoRA']:.0%}", peak["lean"] < 0.6 * peak["LoRA"])
        check(f"recomputing blocks takes {block[1] / peak['LoRA']:.0%}", block[1] < 0.4 * peak["LoRA"])
        last = peak["the same, a quarter, 4 passes"]
        check(f"all together: {full[1] / last:.0f} times less than full fine-tuning", full[1] > 10 * last)

    drawn, [axes] = figure(height=3.8)
    names = list(results)[::-1]
    held = [results[name][0] / 1e6 for name in names]
    rest = [(results[name][1] - results[name][0]) / 1e6 for name in names]
    axes.barh(names, held, label="always held: weights, adapters, averages")
    axes.barh(names, rest, left=held, label="for a moment: activations, gradients, logits")
    axes.set(xlabel="megabytes at the peak of a training step", title="What each remedy saves")
    axes.legend(loc="lower right", fontsize="small")
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()
