"""Taking time: calls against each other in shuffled rounds, on a machine that does nothing else."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rows import quantile

MAX_DRIFT = 0.05  # of the reference's time, from the first third of the rounds to the last
SPARE_LOAD = 0.5  # processes besides our own threads in the load average before the start


def milliseconds(call: Callable[[], Any], device: str = "cpu", repeats: int = 1, *, collects: bool = False) -> float:
    """Mean wall time of a call, with what it left on the device done.

    `collects` lets garbage be searched for in between, as users have it: for calls that make many objects. Else a
    search through what another subject made would count here.
    """
    gc.collect()
    if not collects:
        gc.disable()
    _finish(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _finish(device)
    elapsed = time.perf_counter() - start
    gc.enable()
    return 1e3 * elapsed / repeats


def settle() -> None:
    """Keep the garbage collector from looking through everything loaded so far before every timed call."""
    gc.collect()
    gc.freeze()


def timed(call: Callable[[], Any], device: str = "cpu", *, collects: bool = False) -> tuple[float, Any]:
    """`milliseconds` of one call, and what it returned."""
    results: list[Any] = []
    elapsed = milliseconds(lambda: results.append(call()), device, collects=collects)
    return elapsed, results[0]


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def race(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    device: str = "cpu",
    warm_ups: int = 2,
    repeats: int = 1,
    clean_up: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of every call in every round, in a new random order each round; `clean_up` is not timed."""
    order, shuffler = list(calls), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(warm_ups + rounds):
        shuffler.shuffle(order)
        for name in order:
            elapsed = milliseconds(calls[name], device, repeats)
            clean_up()
            if index >= warm_ups:
                times[name].append(elapsed)
    return times


def drift(series: Sequence[float]) -> float:
    """How far the median of the last third of a series lies from that of the first, as a share of the first."""
    third = max(1, len(series) // 3)
    return abs(quantile(series[-third:], 0.5) / quantile(series[:third], 0.5) - 1)


def steady_race(
    calls: dict[str, Callable[[], Any]], rounds: int, reference: str, *, force: bool = False, **options: Any
) -> dict[str, list[float]] | None:
    """`race`, again if the reference's time drifts meanwhile; None when it still does the third time, unless forced."""
    for _ in range(3):
        times = race(calls, rounds, **options)
        if force or drift(times[reference]) <= MAX_DRIFT:
            return times
    return None


def busy() -> str | None:
    """Why nothing should be timed now, or None."""
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    if load <= threads + SPARE_LOAD:
        return None
    return f"load average {load:.2f} with {threads} more threads about to start: other work would be measured too (--force does it)"
