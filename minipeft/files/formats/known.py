"""All formats of other tools, the files they write, and which format a file is of."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from minipeft.errors import CheckpointError, shown
from minipeft.files.file_names import OF_OTHER_TOOLS
from minipeft.files.formats.diffusers import DIFFUSERS
from minipeft.files.formats.foreign import Format, Part, Source
from minipeft.files.formats.kohya import KOHYA
from minipeft.files.formats.litgpt import LITGPT
from minipeft.files.formats.mlx import MLX
from minipeft.files.formats.torchtune import TORCHTUNE
from minipeft.files.tensor_file import TensorFile

FORMATS = (MLX, TORCHTUNE, LITGPT, KOHYA, DIFFUSERS)
# Pickles that hold an adapter. What else ends so in a folder is an optimizer, or what torch.save was given.
PICKLES = re.compile(r"adapter_model\.(?:bin|pt)|adapter_\d+\.pt|pytorch_lora_weights\.bin|lit_model\.pth\.lora")


def format_of(file: TensorFile) -> Format | None:
    """The format of a file; None: PEFT's, or none that is known."""
    return next((known for known in FORMATS if file.shapes and known.knows(file)), None)


def weights_in(names: Collection[str]) -> str | None:
    """The safetensors file in a folder that another tool may have written; None if it is not clear which."""
    candidates = [name for name in OF_OTHER_TOOLS if name in names] or [
        name for name in names if name.endswith(".safetensors")
    ]
    return candidates[0] if len(candidates) == 1 else None


def pickles_in(names: Collection[str]) -> list[str]:
    """The pickles in a folder that hold an adapter, by their names."""
    return [name for name in names if PICKLES.fullmatch(name)]


def parts(source: Source, known: Format) -> dict[str, Part]:
    """The adapter of each component that a file is for; raises CheckpointError if something in it has no place."""
    return {name: known.read(source, name, keys) for name, keys in known.components(source.file).items()}


def only_part(source: Source, known: Format) -> Part:
    """The adapter in a file for one model.

    Raises:
        CheckpointError: it is for several parts of a pipeline, or something in it has no place.
    """
    found = known.components(source.file)
    if len(found) > 1:
        raise CheckpointError(
            f"{source.file.path} is a file of {known.name} for several parts of a pipeline ({shown(found)}); "
            f"`minipeft convert {os.fspath(source.directory)} OUT` makes an adapter for each."
        )
    ((name, keys),) = found.items()
    return known.read(source, name, keys)


def is_one_file(place: Path) -> bool:
    """Whether a place is a file of weights and not a folder."""
    return place.suffix == ".safetensors" or PICKLES.fullmatch(place.name) is not None
