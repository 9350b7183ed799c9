"""How fast: one adapted layer, a training step, its calls, decoding, merging, methods, packing, experts, mixed batches; next to PEFT.

    python benchmarks/speed.py                    # every part; the layers take most of the time
    python benchmarks/speed.py --part step
    python benchmarks/speed.py --quick

All subjects of a case run in one process, in a new random order each round, and no time is reported before they
are found to compute the same. The README in this folder says what each measure means.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import plots
import torch
from calls import calls_part
from compiled import compile_part
from decode import decode_part
from experts import experts_part
from layer import layer_part
from many import many_part
from merge import merge_part
from methods import methods_part
from options import Options
from packing import packing_part
from rows import RESULTS, Rows, on_device, show, write_rows
from step import step_part
from timing import busy, settle

PARTS: dict[str, Callable[[Options], Iterator[Rows | None]]] = {
    "layer": layer_part,
    "step": step_part,
    "calls": calls_part,
    "compile": compile_part,
    "decode": decode_part,
    "merge": merge_part,
    "methods": methods_part,
    "packing": packing_part,
    "experts": experts_part,
    "many": many_part,
}


def run_part(part: str, options: Options, folder: Path | None) -> bool:
    """Measure, print and write one part; False if a case was refused."""
    rows: Rows = []
    complete, path = True, None
    for some in PARTS[part](options):
        complete = complete and some is not None
        for row in some or ():
            rows.append(on_device(row, options.device))
            show(row)
        if folder is not None and rows:  # what is measured is kept if the next case breaks off
            path = write_rows(f"speed_{part}" + ("_cuda" if options.device == "cuda" else ""), rows, folder)
    if path is not None:
        print(path)
    return complete


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round, nothing written without --output")
    parser.add_argument("--part", choices=list(PARTS), action="append", help="several may be given; default: all")
    parser.add_argument("--rounds", type=int, help="default: 30 for layers, 10 for steps, 20 for the rest")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="default: 2; --quick takes 1")
    parser.add_argument("--force", action="store_true", help="report what was measured on a busy or unsteady machine")
    parser.add_argument(
        "--case", default="", help='steps only: the cases with this in their name, such as "Llama 134M, bf"'
    )
    parser.add_argument("--output", type=Path, help="folder for the rows and plots; default: benchmarks/results")
    args = parser.parse_args(argv)
    if args.case and (args.part != ["step"] or not (args.output or args.quick)):
        parser.error(
            "--case is for --part step, with --output elsewhere: the file in results/ would lose the other cases"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(1 if args.quick else args.threads)
    why = None if args.force or args.quick else busy()
    if why is not None:
        raise SystemExit(why)
    options = Options(
        args.device, getattr(torch, args.dtype), args.rounds, args.quick, args.force or args.quick, args.case
    )
    folder = args.output or (None if args.quick else RESULTS)
    settle()
    complete = [run_part(part, options, folder) for part in args.part or PARTS]
    if folder is not None:
        plots.draw(folder)
    if not all(complete):
        raise SystemExit(
            "some cases were refused: the machine is not steady enough (--force reports them all the same)"
        )


if __name__ == "__main__":
    main()
