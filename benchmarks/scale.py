"""What the verbs cost as a model grows: injecting, saving, loading, switching, disabling and merging, next to PEFT.

    python benchmarks/scale.py            # about twenty minutes on two cores, most of it PEFT's
    python benchmarks/scale.py --quick

Trees of small linear layers, seven a block as in a Llama, so the arithmetic is nothing and the bookkeeping all; and GPT-2.
Both libraries adapt copies of the same model with the same options, in one process, in turns. What each model computes is
held against what it must compute, or nothing is reported. Python searches for garbage as it does for users. The peer of
our merge is PEFT's with `safe_merge=True`, which checks for NaN as ours always does. Ratios are ours over PEFT's. The
growth rows say how many times longer a verb takes in the largest tree than in the smallest.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from options import hold_against, output, quietly
from plots import draw
from rows import RESULTS, Row, compare, show, write_rows
from subjects import TARGETS, gpt2
from timing import busy, timed
from torch import nn
from transformers import GPT2LMHeadModel

import minipeft

Times = dict[str, float]  # milliseconds by measure
SIZES = (1400, 5600, 11200)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SERVING = "switch, neither trains"
MERGE = "merge_and_unload"


def small_layers(count: int) -> nn.Module:
    """A tree of small linear layers, seven a block as in a Llama."""
    blocks = [OrderedDict((name, nn.Linear(8, 8)) for name in PROJECTIONS) for _ in range(count // 7)]
    return nn.Sequential(*map(nn.Sequential, blocks))


def example(base: nn.Module) -> torch.Tensor:
    return torch.arange(32)[None] if isinstance(base, GPT2LMHeadModel) else torch.linspace(-1, 1, 8)[None]


def options(base: nn.Module, **more: Any) -> dict[str, Any]:
    targets = TARGETS if isinstance(base, GPT2LMHeadModel) else PROJECTIONS
    return {"r": 8, "target_modules": targets, "init_lora_weights": False, **more}


def clock(times: Times, measure: str, call: Callable[[], Any]) -> Any:
    times[measure], result = timed(call, collects=True)
    return result


def switch_off_and_on(model: nn.Module) -> None:
    with model.disable_adapter():
        pass


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
    model.add_adapter("third", minipeft.LoraConfig(**options(model, inference_mode=True)))
    return "third"


def run_ours(base: nn.Module, folder: Path) -> Times:
    config = minipeft.LoraConfig(**options(base))
    model, times = use(lambda: minipeft.get_lora_model(base, config), base, folder, third)
    return merged(model, example(base), times, model.merge_and_unload)


def run_peft(base: nn.Module, folder: Path) -> Times:
    config = peft.LoraConfig(**options(base))
    model, times = use(lambda: peft.get_peft_model(base, config), base, folder, lambda _: "default")
    return merged(model, example(base), times, lambda: model.merge_and_unload(safe_merge=True))


def merged(model: nn.Module, x: torch.Tensor, times: Times, merge: Callable[[], nn.Module]) -> Times:
    expected = output(model, x)
    hold_against(expected, clock(times, MERGE, merge), x)
    return times


def measure(sizes: Sequence[int], rounds: int, folder: Path, quick: bool = False) -> list[Row]:
    """The rows of each size and of GPT-2, then those of growth."""
    cases: dict[str, Callable[[], nn.Module]] = {f"{n} layers": functools.partial(small_layers, n) for n in sizes}
    cases["tiny GPT-2" if quick else "GPT-2 124M"] = lambda: gpt2(quick).eval()
    all_times: dict[str, tuple[list[Times], list[Times]]] = {}
    rows: list[Row] = []
    for case, make in cases.items():
        torch.manual_seed(0)
        base = make()
        sides: tuple[list[Times], list[Times]] = ([], [])
        for index in range(rounds):
            runs = list(zip(sides, (run_ours, run_peft), strict=True))
            for times, run in runs if index % 2 else runs[::-1]:
                times.append(run(copy.deepcopy(base), folder / case / run.__name__))
        all_times[case] = sides
        for name in sides[0][0]:
            series = [[times[name] for times in side] for side in sides]
            rows.append(compare("scale", case, name, "ms", *series, peer_of(name)))
            show(rows[-1])
    small, large = (all_times[f"{size} layers"] for size in (sizes[0], sizes[-1]))
    for name in small[0][0]:
        growth = [
            [b[name] / a[name] for a, b in zip(few, many, strict=True)] for few, many in zip(small, large, strict=True)
        ]
        case = f"{sizes[0]} to {sizes[-1]} layers, {sizes[-1] / sizes[0]:g}x"
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
        for run in (run_ours, run_peft):  # what is done once a process
            run(small_layers(7), Path(folder) / "first")
        rows = measure(
            (7, 14) if args.quick else args.sizes, 1 if args.quick else args.rounds, Path(folder), args.quick
        )
    where = args.output or (None if args.quick else RESULTS)
    if where is not None:
        print(write_rows("scale", rows, where))
        draw(where, "scale")


if __name__ == "__main__":
    main()
