"""The names of a model's modules, from the headers of its weights on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from minipeft.errors import CheckpointError
from minipeft.files.tensor_file import open_tensors

# Where a diffusers pipeline keeps what a file says "unet" for: newer ones have a transformer instead.
FOLDERS = {"unet": ("unet", "transformer")}


def modules_of(base: Path) -> Callable[[str], Collection[str] | None]:
    """Asks a model's folder, or a pipeline's with a folder for each component, for the names of modules with weights.

    Raises:
        CheckpointError: (the call that is returned) there are no safetensors there.
    """

    def ask(component: str) -> Collection[str]:
        folders = [base / name for name in FOLDERS.get(component, (component,))]
        folder = next((folder for folder in folders if component and os.path.isdir(folder)), base)
        files = sorted(folder.glob("*.safetensors")) if os.path.isdir(folder) else []
        if not files:
            raise CheckpointError(
                f"{folder} has no safetensors to take the names of the modules of {component or 'it'} from."
            )
        return dict.fromkeys(key.rpartition(".")[0] for path in files for key in open_tensors(path).shapes)

    return ask
