"""What every benchmark shares: how time is taken, a row that says where it comes from, and the file it goes to."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import gc
import os
import platform
import random
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).resolve().parent / "results"
MAX_DRIFT = 0.05  # of the reference's time, from the first third of the rounds to the last
SPARE_LOAD = 0.5  # processes beside our own threads in the load average before the start


@functools.cache  # what stood there when the run began; writing results does not change it
def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def device_name(device: str = "cpu") -> str:
    """Name of the processor or of the CUDA device that the work was done on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


# Results of an earlier run are no code.
UNCOMMITTED = ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")


@dataclass
class Row:
    """One measurement: `ours` and `peer` in the same unit, and their ratio as the median over rounds."""

    benchmark: str
    case: str
    measure: str
    unit: str
    ours: float
    peer: float
    ratio: float
    ratio_low: float  # 20 % quantile over the rounds
    ratio_high: float  # 80 %
    rounds: int
    peer_name: str
    device: str = field(default_factory=device_name)
    threads: int = field(default_factory=torch.get_num_threads)
    torch: str = field(default_factory=lambda: version("torch"))
    transformers: str = field(default_factory=lambda: version("transformers"))
    peft: str = field(default_factory=lambda: version("peft"))
    commit: str = field(default_factory=lambda: _git("rev-parse", "--short", "HEAD"))
    dirty: bool = field(default_factory=lambda: bool(_git(*UNCOMMITTED)))
    subject: str = "minipeft"  # whose value `ours` is


Rows = list[Row]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def compare(
    benchmark: str,
    case: str,
    measure: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    peer_name: str,
    subject: str = "minipeft",
) -> Row:
    """The row of two equally long series: their medians, and the median and quantiles of the ratios round by round."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    medians = (quantile(ours, 0.5), quantile(peer, 0.5))
    spread = [quantile(ratios, share) for share in (0.5, 0.2, 0.8)]
    return Row(benchmark, case, measure, unit, *medians, *spread, len(ratios), peer_name, subject=subject)


def show(row: Row) -> None:
    """One line for the terminal."""
    print(
        f"{row.case} | {row.measure} | {row.subject} {row.ours:.4g} {row.unit}, {row.peer_name} {row.peer:.4g} {row.unit}"
        f" | ratio {row.ratio:.4f} ({row.ratio_low:.4f} to {row.ratio_high:.4f})",
        flush=True,
    )


# -------------------------------------------------------------------------------------------------------- taking time
def milliseconds(call: Callable[[], Any], device: str = "cpu", repeats: int = 1) -> float:
    """Mean wall time of a call, with what it left on the device done and no garbage collection in between."""
    gc.collect()
    gc.disable()  # a collection of what another subject left behind is not this one's time
    _finish(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _finish(device)
    elapsed = time.perf_counter() - start
    gc.enable()
    return 1e3 * elapsed / repeats


def settle() -> None:
    """What is loaded by now is not looked through for garbage before every timed call."""
    gc.collect()
    gc.freeze()


def timed(call: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Milliseconds of one call, and what it returned."""
    results: list[Any] = []
    elapsed = milliseconds(lambda: results.append(call()), device)
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
    """Milliseconds of every call in every round, in an order shuffled anew each round; `clean_up` is not timed."""
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
    return f"load average {load:.2f} with {threads} threads to come: other work would be measured too (--force does it)"


# ------------------------------------------------------------------------------------------------------ parts of speed
@dataclass(frozen=True)
class Options:
    """What `speed.py` was asked for, and how its parts are to keep to it."""

    device: str
    dtype: torch.dtype
    rounds: int | None
    quick: bool
    force: bool

    def rounds_or(self, usual: int) -> int:
        return self.rounds or (2 if self.quick else usual)

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype)

    def race(self, calls: dict[str, Callable[[], Any]], rounds: int, reference: str, **others: Any) -> Any:
        return steady_race(calls, rounds, reference, force=self.force, device=self.device, **others)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without PEFT's notes on fan_in_fan_out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refused(case: str) -> None:
    """Say that a case is left out."""
    print(
        f"{case}: refused, since the time of what all is compared with drifted by more than {MAX_DRIFT:.0%}", flush=True
    )


# ------------------------------------------------------------------------------------------------------------ checking
@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    """What a model computes; the logits of a language model."""
    result = model(x)
    return getattr(result, "logits", result)


def hold_against(expected: Tensor, merged: nn.Module, x: Tensor) -> None:
    """A merge that changes what the model computes is no merge, and its time says nothing."""
    torch.testing.assert_close(output(merged, x), expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- files
def write_rows(name: str, rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Write the rows to ``<folder>/<name>.csv``, replacing what stood there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()} for row in rows
        )
    return path
