"""Named places at which a test has the process die on the spot, as an eviction or the out-of-memory killer would.

``MINIPEFT_FAULT=before_rename`` ends the process with exit code 137, without any clean-up, when it first comes to the
place of that name; ``MINIPEFT_FAULT=before_rename:3`` when it comes there for the third time.
"""

from __future__ import annotations

import os
from collections import Counter

from minipeft.errors import ConfigError, hint, shown

VARIABLE, EXIT_CODE = "MINIPEFT_FAULT", 137  # what a shell reports of a process that was killed
# In the order in which saving comes to them; see `minipeft.training.runs.checkpoints` and `run_state`.
FAULT_POINTS = (
    "temporary_made",
    "adapter_written",
    "optimizer_written",
    "files_written",
    "files_synced",
    "complete_written",
    "before_rename",
    "old_set_aside",  # only where a step is saved again
    "after_rename",
    "before_prune",
    "pruned_one_renamed",
    "after_prune",
)
_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Die here if the environment asks for it.

    Raises:
        ConfigError: the environment asks for a place that does not exist, or `name` is none.
    """
    asked = os.environ.get(VARIABLE, "")
    wanted, _, count = asked.partition(":")
    if name not in FAULT_POINTS or (wanted and wanted not in FAULT_POINTS) or not (count or "1").isdecimal():
        raise ConfigError(
            f"{VARIABLE}={asked!r} at {name!r}: there is no such fault point{hint(wanted, FAULT_POINTS)}; there are: "
            f"{shown(FAULT_POINTS, len(FAULT_POINTS))}."
        )
    _passed[name] += 1
    if wanted == name and _passed[name] == int(count or 1):
        os._exit(EXIT_CODE)
