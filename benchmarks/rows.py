"""A measurement as a row that says where it comes from, and the file that holds the rows."""

from __future__ import annotations

import csv
import dataclasses
import functools
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from minipeft.kernels import matmul

RESULTS = Path(__file__).resolve().parent / "results"


@functools.cache  # the state when the run began; writing results does not change it
def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def device_name(device: str = "cpu") -> str:
    """Name of the processor or of the CUDA device that the work was done on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def on_device(row: Row, device: str) -> Row:
    """The row, with what it says of the processor said of the device that did the work."""
    row.device = device_name(device)
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        row.instructions, row.matrix_library, row.fast_products = (
            f"compute capability {major}.{minor}",
            "cuBLAS",
            "torch's",
        )
    return row


def instructions() -> str:
    """What torch's own kernels use of this processor, and for which halves of float32 it has products."""
    halves = [str(dtype).removeprefix("torch.") for dtype in matmul.HALF if matmul.has_kernels(dtype)]
    return f"{torch.backends.cpu.get_cpu_capability()}, products in {' and '.join(['float32', *halves])}"


def matrix_library() -> str:
    """The library that torch multiplies float32 matrices with."""
    built = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {"mkl": "MKL", "open": "OpenBLAS"}.get(built[1], built[1]) if built else "unknown"


def fast_products() -> str:
    """What `minipeft.kernels.matmul` does here."""
    if matmul.onednn_is_faster():
        return "oneDNN"
    return "torch's" if all(map(matmul.has_kernels, matmul.HALF)) else "torch's, halves in float32"


# Results of an earlier run do not count as changes of the code.
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
    instructions: str = field(default_factory=instructions)
    matrix_library: str = field(default_factory=matrix_library)
    fast_products: str = field(default_factory=fast_products)


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


def write_rows(name: str, rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Write the rows to ``<folder>/<name>.csv``, replacing the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()} for row in rows
        )
    return path
