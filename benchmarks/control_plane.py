"""What one waits for around training: injecting, saving, loading, switching, disabling and merging, beside PEFT.

    python benchmarks/control_plane.py            # about three minutes on two cores
    python benchmarks/control_plane.py --quick

Both libraries adapt deep copies of the same model with the same options, in one process, in turns, each round in the
other order; what a merged model computes must be what it computed before, or nothing is reported. The peer of our merge
is PEFT's with `safe_merge=True`, which checks for NaN as ours always does; its plain merge has a row of its own.
Ratios are ours over PEFT's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from common import Row, quantile, write_rows
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import minipeft

Times = dict[str, float]  # milliseconds by measure


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def small_layers(count: int) -> nn.Module:
    """A tree of small linear layers, seven a block as in a Llama: the arithmetic is nothing, the bookkeeping all."""
    blocks = [OrderedDict((name, nn.Linear(8, 8)) for name in PROJECTIONS) for _ in range(count // 7)]
    return nn.Sequential(*map(nn.Sequential, blocks))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "350 layers": (lambda: small_layers(350), PROJECTIONS),
    "1400 layers": (lambda: small_layers(1400), PROJECTIONS),
    "5600 layers": (lambda: small_layers(5600), PROJECTIONS),
    "GPT-2 124M": (gpt2, ["c_attn", "c_proj", "c_fc"]),
}


def timed(times: Times, measure: str, call: Callable[[], Any]) -> Any:
    gc.collect()
    gc.disable()  # a collection of what another step left behind is not this step's time
    start = time.perf_counter()
    result = call()
    times[measure] = 1e3 * (time.perf_counter() - start)
    gc.enable()
    return result


def switch_off_and_on(model: nn.Module) -> None:
    with model.disable_adapter():
        pass


def example(base: nn.Module) -> torch.Tensor:
    return torch.arange(32)[None] if isinstance(base, GPT2LMHeadModel) else torch.linspace(-1, 1, 8)[None]


@torch.no_grad()
def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result = model(x)
    return getattr(result, "logits", result)


def hold_against(expected: torch.Tensor, merged: nn.Module, x: torch.Tensor) -> None:
    """A merge that changes what the model computes is no merge, and its time says nothing."""
    torch.testing.assert_close(output(merged, x), expected, rtol=1e-3, atol=1e-3)


def run_ours(base: nn.Module, targets: list[str], folder: Path) -> Times:
    times: Times = {}
    config = minipeft.LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
    model = timed(times, "inject", lambda: minipeft.get_lora_model(base, config))
    timed(times, "save", lambda: model.save_pretrained(folder))
    timed(times, "load a second adapter", lambda: model.load_adapter(folder, "second"))
    timed(times, "switch", lambda: model.set_adapter("second"))
    timed(times, "disable and enable", lambda: switch_off_and_on(model))
    x = example(base)
    expected = output(model, x)
    hold_against(expected, timed(times, "merge_and_unload", lambda: model.merge_and_unload()), x)
    times["merge_and_unload, unchecked peer"] = times["merge_and_unload"]
    return times


def run_peft(base: nn.Module, targets: list[str], folder: Path) -> Times:
    times: Times = {}
    config = peft.LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
    model = timed(times, "inject", lambda: peft.get_peft_model(base, config))
    timed(times, "save", lambda: model.save_pretrained(folder))
    timed(times, "load a second adapter", lambda: model.load_adapter(folder, "second"))
    timed(times, "switch", lambda: model.set_adapter("second"))
    timed(times, "disable and enable", lambda: switch_off_and_on(model))
    x, twin = example(base), copy.deepcopy(model)
    expected = output(model, x)
    hold_against(expected, timed(times, "merge_and_unload, unchecked peer", twin.merge_and_unload), x)
    hold_against(expected, timed(times, "merge_and_unload", lambda: model.merge_and_unload(safe_merge=True)), x)
    return times


def measure(case: str, rounds: int) -> list[Row]:
    make, targets = CASES[case]
    torch.manual_seed(0)
    base = make()
    ours: list[Times] = []
    theirs: list[Times] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's notes on fan_in_fan_out
        for index in range(rounds + 1):
            runs = [(ours, run_ours), (theirs, run_peft)]
            for times, run in runs if index % 2 else runs[::-1]:
                times.append(run(copy.deepcopy(base), targets, Path(folder) / run.__name__))
    rows = []
    for name in ours[0]:
        pairs = [(a[name], b[name]) for a, b in zip(ours[1:], theirs[1:], strict=True)]  # the first round warms up
        ratios = [a / b for a, b in pairs]
        peer = "PEFT, safe_merge=True" if name == "merge_and_unload" else "PEFT"
        medians = [quantile(side, 0.5) for side in zip(*pairs, strict=True)]
        rows.append(
            Row(
                "control_plane",
                case,
                name,
                "ms",
                *medians,
                quantile(ratios, 0.5),
                quantile(ratios, 0.2),
                quantile(ratios, 0.8),
                rounds,
                peer,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest case, one round, nothing written")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for case in list(CASES)[:1] if args.quick else CASES:
        for row in measure(case, 1 if args.quick else args.rounds):
            rows.append(row)
            print(
                f"{row.case:<12} {row.measure:<34} ours {row.ours:10.3f} ms   {row.peer_name:<22} {row.peer:10.3f} ms   "
                f"ratio {row.ratio:.4f} ({row.ratio_low:.4f} to {row.ratio_high:.4f})",
                flush=True,
            )
    if not args.quick:
        print(write_rows("control_plane", rows))


if __name__ == "__main__":
    main()
