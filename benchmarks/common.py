"""What every benchmark shares: a row that says where it comes from, and the file it goes to."""

from __future__ import annotations

import csv
import dataclasses
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


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
    device: str = field(default_factory=_device)
    threads: int = field(default_factory=torch.get_num_threads)
    torch: str = field(default_factory=lambda: version("torch"))
    transformers: str = field(default_factory=lambda: version("transformers"))
    peft: str = field(default_factory=lambda: version("peft"))
    commit: str = field(default_factory=lambda: _git("rev-parse", "--short", "HEAD"))
    dirty: bool = field(default_factory=lambda: bool(_git("status", "--porcelain", "--untracked-files=no")))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def write_rows(name: str, rows: Sequence[Row]) -> Path:
    """Write the rows to ``results/<name>.csv``, replacing what stood there."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()} for row in rows
        )
    return path
