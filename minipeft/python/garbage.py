"""Pausing Python's garbage collector while a call makes many objects that all stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

MANY = 50_000  # new objects; to look at so many takes milliseconds


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Pause the garbage collector within the block; if the block makes many objects, they count as old afterwards.

    The collector looks at all objects again each time their number has grown by a quarter. With 11,200 layers that takes
    half of the time of adapting a model, and a third of the time of loading, saving or merging an adapter. New objects it
    would look at once more right after the block, which takes a tenth.
    """
    if not gc.isenabled():
        yield
        return
    before = gc.get_count()[0]
    gc.disable()
    try:
        yield
    finally:
        if gc.get_count()[0] - before > MANY and not gc.get_freeze_count():  # or what the user has frozen would thaw
            gc.freeze()
            gc.unfreeze()
        gc.enable()
