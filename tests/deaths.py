"""Processes that die just before one of their writes, without any clean-up, as the out-of-memory killer ends them.

Python reports every file-system call to audit hooks (PEP 578), so what is tested needs to know nothing of it.
Run as a program, ``python deaths.py NUMBER SCRIPT WORDS...`` runs a script that dies while it saves: before a checkpoint
gets its name for the NUMBERth time.
"""

import itertools
import os
import re
import runpy
import sys

EXIT_CODE = 137  # what a shell reports of a process that was killed
CHANGES = {"os.mkdir", "os.rename", "os.rmdir", "shutil.rmtree"}


def is_write(event, args):
    """Whether a call changes a file or folder of checkpoints; one removed file stands for all of its folder."""
    if event == "open":
        return "step-" in str(args[0]) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    if event == "os.remove":
        return os.path.basename(args[0]) == "state.json"
    return event in CHANGES


def is_naming(event, args):
    """Whether a call gives a checkpoint its name."""
    return event == "os.rename" and re.fullmatch(r"step-\d+", os.path.basename(args[1])) is not None


def die_before(number, is_meant=is_write):
    """End this process before the call of this number, counted from 1, among those that are meant."""
    calls = itertools.count(1)

    def hook(event, args):
        if is_meant(event, args) and next(calls) == number:
            os._exit(EXIT_CODE)

    sys.addaudithook(hook)


if __name__ == "__main__":
    die_before(int(sys.argv[1]), is_naming)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
