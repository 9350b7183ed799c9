"""What this machine can do: matrix products by both libraries, and copies; the rates that the training steps are compared with."""

from __future__ import annotations

from typing import Any

import torch
from options import Options
from rows import Row, Rows, compare
from timing import race
from torch import Tensor

from minipeft.kernels import matmul


def rate_rows(options: Options) -> Rows:
    """Matrix products, wide and narrow ones, and copies."""
    m, k, n = (64, 48, 96) if options.quick else (4096, 768, 2304)
    new = torch.empty(0, device=options.device, dtype=options.dtype).new_empty
    x, weight = new(m, k).normal_(), new(n, k).normal_()
    rows = [rate(options, f"{m}x{k}x{n}", m * k * n, matmul.linear, torch.nn.functional.linear, x, weight)]
    for r in (8, 16, 64):
        narrow = new(k, r).normal_()
        rows.append(rate(options, f"{m}x{k}x{r}", m * k * r, matmul.narrow, torch.mm, x, narrow))
    return [*rows, copy_rates(options)]


def rate(options: Options, shape: str, products: int, ours: Any, theirs: Any, *inputs: Tensor) -> Row:
    calls = {"ours": lambda: ours(*inputs), "torch": lambda: theirs(*inputs)}
    with torch.no_grad():
        times = race(calls, options.rounds_or(20), device=options.device, repeats=5)
    rates = [[2e-6 * products / ms for ms in times[name]] for name in calls]
    return compare("speed_step", shape, "matrix product", "GFLOP/s", *rates, "torch", "minipeft.kernels.matmul")


def copy_rates(options: Options) -> Row:
    """Bytes read and written a second when an array is copied to one that is there already."""
    sizes = (2**16, 2**20) if options.quick else (64 * 10**6, 10**9)
    rates = []
    for size in sizes:
        source = torch.ones(size, dtype=torch.uint8, device=options.device)
        target = source.clone()
        calls = {"copy": lambda source=source, target=target: target.copy_(source)}
        times = race(calls, options.rounds_or(10), device=options.device)["copy"]
        rates.append([2e-6 * size / ms for ms in times])
    names = [f"array of {size / 1e6:.3g} MB" for size in sizes]
    return compare("speed_step", "copy, bytes read and written", "copy", "GB/s", *rates, names[1], names[0])
