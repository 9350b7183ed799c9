"""What this library makes of an adapter: the outputs that another reader's are compared with."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from minipeft.model import load_adapter
from minipeft.readers.tries import base_model, outputs


def our_logits(base: Path, directory: Path) -> Tensor:
    """Outputs of the base in `base` with the adapter in `directory`.

    Raises:
        MinipeftError: the base or the adapter cannot be loaded.
    """
    return outputs(load_adapter(base_model(base), directory))
