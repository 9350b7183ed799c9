"""What the verbs cost as a model grows: injecting, saving, loading, switching, disabling and merging, next to PEFT.

    python benchmarks/scale.py            # about ten minutes on two cores, most of it PEFT's
    python benchmarks/scale.py --quick

Trees of small linear layers, seven a block as in a Llama, so the arithmetic is nothing and the bookkeeping all. Both
libraries adapt copies of the same tree with the same options, in one process, in turns. What each model computes is held
against what it must compute, or nothing is reported. Ratios are ours over PEFT's. The growth rows say how many times
longer a verb takes in the largest tree than in the smallest.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from control_plane import PROJECTIONS, clock, example, small_layers, switch_off_and_on
from options import hold_against, output, quietly
from plots import draw
from rows import RESULTS, Row, compare, show, write_rows
from timing import busy, settle
from torch import nn

import minipeft

Times = dict[str, float]  # milliseconds by measure
SIZES = (1400, 5600, 11200)
OPTIONS: dict[str, Any] = {"r": 8, "target_modules": PROJECTIONS, "init_lora_weights": False}
SERVING = "switch, neither trains"
MERGE = "merge_and_unload"


def use(
    adapt: Callable[[], nn.Module], base: nn.Module, folder: Path, other: Callable[[nn.Module], str]
) -> tuple[nn.Module, Times]:
    """All that both libraries do by the same verbs, up to merging; `other` names an adapter to switch to when serving."""
    times: Times = {}
    x = example(base)
    without = output(base, x)
    model = clock(times, "inject", adapt)
    expected = output(model, x)
    clock(times, "save", lambda: model.save_pretrained(folder))
    clock(times, "load a second adapter", lambda: model.load_adapter(folder, "second"))
    clock(times, "switch, one trains", lambda: model.set_adapter("second"))
    torch.testing.assert_close(output(model, x), expected)
    name = other(model)
    clock(times, SERVING, lambda: model.set_adapter(name))
    model.set_adapter("second")
    clock(times, "disable and enable", lambda: switch_off_and_on(model))
    with model.disable_adapter():
        torch.testing.assert_close(output(model, x), without)
    return model, times


def third(model: nn.Module) -> str:
    """Another adapter that does not train; PEFT, which does the same work for any, goes back to the first instead."""
    model.add_adapter("third", minipeft.LoraConfig(**OPTIONS, inference_mode=True))
    return "third"


def run_ours(base: nn.Module, folder: Path) -> Times:
    config = minipeft.LoraConfig(**OPTIONS)
    model, times = use(lambda: minipeft.get_lora_model(base, config), base, folder, third)
    return merged(model, times, lambda: model.merge_and_unload())


def run_peft(base: nn.Module, folder: Path) -> Times:
    config = peft.LoraConfig(**OPTIONS)
    model, times = use(lambda: peft.get_peft_model(base, config), base, folder, lambda _: "default")
    return merged(model, times, lambda: model.merge_and_unload(safe_merge=True))


def merged(model: nn.Module, times: Times, merge: Callable[[], nn.Module]) -> Times:
    x = example(model)
    expected = output(model, x)
    hold_against(expected, clock(times, MERGE, merge), x)
    return times


def measure(sizes: Sequence[int], rounds: int, folder: Path) -> list[Row]:
    """The rows of each size, then those of growth."""
    all_times: dict[int, tuple[list[Times], list[Times]]] = {}
    rows: list[Row] = []
    for size in sizes:
        torch.manual_seed(0)
        base = small_layers(size)
        settle()
        sides: tuple[list[Times], list[Times]] = ([], [])
        for index in range(rounds):
            runs = list(zip(sides, (run_ours, run_peft), strict=True))
            for times, run in runs if index % 2 else runs[::-1]:
                times.append(run(copy.deepcopy(base), folder / run.__name__))
        all_times[size] = sides
        for name in sides[0][0]:
            series = [[times[name] for times in side] for side in sides]
            rows.append(compare("scale", f"{size} layers", name, "ms", *series, peer_of(name)))
            show(rows[-1])
    small, large = sizes[0], sizes[-1]
    for name in all_times[small][0][0]:
        growth = [
            [b[name] / a[name] for a, b in zip(all_times[small][side], all_times[large][side], strict=True)]
            for side in (0, 1)
        ]
        case = f"{small} to {large} layers, {large / small:g}x"
        rows.append(compare("scale", case, f"growth: {name}", "x", *growth, peer_of(name)))
        show(rows[-1])
    return rows


def peer_of(name: str) -> str:
    return {MERGE: "PEFT, safe_merge=True", SERVING: "PEFT, one trains"}.get(name, "PEFT")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two small trees, and nothing written unless --output says where"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of layers, the smallest first")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder for the rows and the picture")
    parser.add_argument("--force", action="store_true", help="measure although other work is running")
    args = parser.parse_args(argv)
    torch.set_num_threads(1 if args.quick else 2)
    if not args.quick and not args.force and (why := busy()):
        raise SystemExit(why)
    with tempfile.TemporaryDirectory() as folder, quietly():
        minipeft.get_lora_model(small_layers(7), minipeft.LoraConfig(**OPTIONS))
        peft.get_peft_model(small_layers(7), peft.LoraConfig(**OPTIONS))
        rows = measure((7, 14) if args.quick else args.sizes, 1 if args.quick else args.rounds, Path(folder))
    where = args.output or (None if args.quick else RESULTS)
    if where is not None:
        print(write_rows("scale", rows, where))
        draw(where, "scale")


if __name__ == "__main__":
    main()
