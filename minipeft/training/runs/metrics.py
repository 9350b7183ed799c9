"""metrics.jsonl: one row per update or evaluation, written at once, read back when a run resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from minipeft.errors import CheckpointError, warn
from minipeft.files.atomic import write_files

FILE = "metrics.jsonl"
Row = dict[str, Any]


class Metrics:
    """The rows of a run, over all its interruptions.

    Args:
        directory: of the run; None: only keep the rows in memory, for all processes but the first.
        step: updates that the run has done; rows of later updates, which an interruption undid, are removed.

    Raises:
        CheckpointError: the existing file holds something else, or cannot be written.
    """

    def __init__(self, directory: Path | None, step: int = 0) -> None:
        self.rows: list[Row] = []
        self._file: BinaryIO | None = None
        self._waiting = b""  # rows for which the disk had no space
        if directory is not None:
            path = directory / FILE
            self.rows = [row for row in read_rows(path) if row["step"] <= step] if step and path.exists() else []
            write_files(directory, {FILE: "".join(map(_line, self.rows)).encode()})
            self._file = path.open("ab", buffering=0)  # so that it can be read during training

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row, which has a ``step``. If the disk is full, that is a warning, and the row waits for the next one."""
        self.rows.append(dict(row))
        if self._file is None:
            return
        late = bool(self._waiting)
        self._waiting += _line(row).encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not late:
                warn(f"{self._file.name} could not be written ({error.strerror}); its rows follow when they can.")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file, without a last one that was cut off; raises CheckpointError if it holds anything else."""
    rows = []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] + 0
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                return rows[: number - 1]
            raise CheckpointError(
                f"{path}, line {number} is not a row of metrics; move the file away to begin a new one."
            ) from None
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
