"""minipeft: LoRA and its relatives for any torch model, in files that PEFT, transformers and vLLM read.

What it offers stands in `minipeft.api`, which is imported at the first use, and torch with it: so ``minipeft --help``
answers at once.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minipeft.api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    try:
        value = globals()[name] = getattr(importlib.import_module("minipeft.api"), name)
        return value
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("minipeft.api").__all__})
