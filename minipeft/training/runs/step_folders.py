"""The folders of checkpoints by step: complete ones, broken ones, and what interrupted saves left behind."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from minipeft.files.atomic import alive
from minipeft.training.runs.complete import described

FOREIGN_LEFTOVER_SECONDS = 24 * 3600  # nobody can tell whether a process of another machine lives, but a save ends
STEP_NAME = re.compile(r"step-(\d{8,})")
HIDDEN_NAME = re.compile(r"\.(step-\d{8,})\.(tmp|old|trash)-(.*)-(\d+)-[0-9a-f]{8}")


def step_folders(folder: Path) -> dict[int, Path]:
    """Every folder with the name of a checkpoint, by step, complete or not."""
    matches = [(STEP_NAME.fullmatch(path.name), path) for path in _entries(folder)]
    found = {int(match[1]): path for match, path in matches if match and path.is_dir()}
    return {step: path for step, path in found.items() if path.name == f"step-{step:08d}"}


def complete_folders(folder: Path) -> dict[int, Path]:
    """The complete checkpoints by step, with those that an interrupted save was about to replace."""
    found = step_folders(folder)
    for hidden, name, kind in leftovers(folder, dead=False):
        if kind == "old":
            found.setdefault(int(name.removeprefix("step-")), hidden)
    return {step: path for step, path in found.items() if described(path, step) is not None}


def newer_folders(folder: Path, step: int) -> list[Path]:
    """All folders that have, or had, the name of a later step, complete or not."""
    found = {**complete_folders(folder), **step_folders(folder)}
    return [path for other, path in sorted(found.items()) if other > step]


def leftovers(folder: Path, *, dead: bool = True) -> Iterator[tuple[Path, str, str]]:
    """(path, name to be, kind) of the hidden folders of saves; `dead`: only those of saves that cannot be going on."""
    for path in _entries(folder):
        match = HIDDEN_NAME.fullmatch(path.name)
        if match and path.is_dir() and not (dead and _may_go_on(path, match[3], int(match[4]))):
            yield path, match[1], match[2]


def _may_go_on(path: Path, host: str, pid: int) -> bool:
    if host == socket.gethostname():
        return pid != os.getpid() and alive(pid)  # a restarted container gets the same process ids
    return time.time() - path.stat().st_mtime < FOREIGN_LEFTOVER_SECONDS


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
