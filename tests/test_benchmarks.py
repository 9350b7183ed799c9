"""The benchmarks run, check what they time, and their committed rows say where they come from."""

import csv
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_control_plane_benchmark_runs():
    command = [sys.executable, str(BENCHMARKS / "control_plane.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measures = [line.split("ours")[0].split("layers")[1].strip() for line in result.stdout.splitlines()]
    assert measures[:3] == ["inject", "save", "load a second adapter"]
    assert len(measures) == 7


def test_every_committed_row_names_its_device_versions_and_commit():
    files = sorted((BENCHMARKS / "results").glob("*.csv"))
    assert files
    for path in files:
        rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
        assert rows
        for row in rows:
            assert all(row[name] for name in ("device", "threads", "torch", "peft", "commit", "ratio", "rounds"))
            assert row["dirty"] == "False", f"{path.name} was measured on uncommitted code"
            assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
