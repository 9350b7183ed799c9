"""Time around training: injecting, saving, loading, switching, disabling and merging, next to PEFT.

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
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from options import hold_against, output, quietly
from rows import Row, compare, write_rows
from timing import settle, timed
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
QUICK = {"35 layers": (lambda: small_layers(35), PROJECTIONS)}


def switch_off_and_on(model: nn.Module) -> None:
    with model.disable_adapter():
        pass


def example(base: nn.Module) -> torch.Tensor:
    return torch.arange(32)[None] if isinstance(base, GPT2LMHeadModel) else torch.linspace(-1, 1, 8)[None]


def clock(times: Times, measure: str, call: Callable[[], Any]) -> Any:
    times[measure], result = timed(call)
    return result


def use(adapt: Callable[[], nn.Module], folder: Path) -> tuple[nn.Module, Times]:
    """All that both libraries do by the same verbs, up to merging."""
    times: Times = {}
    model = clock(times, "inject", adapt)
    clock(times, "save", lambda: model.save_pretrained(folder))
    clock(times, "load a second adapter", lambda: model.load_adapter(folder, "second"))
    clock(times, "switch", lambda: model.set_adapter("second"))
    clock(times, "disable and enable", lambda: switch_off_and_on(model))
    return model, times


def run_ours(base: nn.Module, targets: list[str], folder: Path) -> Times:
    config = minipeft.LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
    model, times = use(lambda: minipeft.get_lora_model(base, config), folder)
    x = example(base)
    expected = output(model, x)
    hold_against(expected, clock(times, "merge_and_unload", lambda: model.merge_and_unload()), x)
    times["merge_and_unload, unchecked peer"] = times["merge_and_unload"]
    return times


def run_peft(base: nn.Module, targets: list[str], folder: Path) -> Times:
    config = peft.LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
    model, times = use(lambda: peft.get_peft_model(base, config), folder)
    x, twin = example(base), copy.deepcopy(model)
    expected = output(model, x)
    hold_against(expected, clock(times, "merge_and_unload, unchecked peer", twin.merge_and_unload), x)
    hold_against(expected, clock(times, "merge_and_unload", lambda: model.merge_and_unload(safe_merge=True)), x)
    return times


def measure(case: str, make: Callable[[], nn.Module], targets: list[str], rounds: int) -> list[Row]:
    torch.manual_seed(0)
    base = make()
    settle()
    ours: list[Times] = []
    theirs: list[Times] = []
    with tempfile.TemporaryDirectory() as folder, quietly():
        for index in range(rounds + 1):
            runs = [(ours, run_ours), (theirs, run_peft)]
            for times, run in runs if index % 2 else runs[::-1]:
                times.append(run(copy.deepcopy(base), targets, Path(folder) / run.__name__))
    rows = []
    for name in ours[0]:
        series = [[times[name] for times in side[1:]] for side in (ours, theirs)]  # the first round warms up
        peer = "PEFT, safe_merge=True" if name == "merge_and_unload" else "PEFT"
        rows.append(compare("control_plane", case, name, "ms", *series, peer))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small case, one round, nothing written")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1 if args.quick else 2)
    rows = []
    for case, (make, targets) in (QUICK if args.quick else CASES).items():
        for row in measure(case, make, targets, 1 if args.quick else args.rounds):
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
