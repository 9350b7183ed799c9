"""An adapter under the names of transformers 4, made with the help of the base's configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.config import config_from_dict
from minipeft.errors import CheckpointError
from minipeft.files.base_checkpoint import CONFIG, cached
from minipeft.files.empty_model import empty_model
from minipeft.files.format import NAMES, open_adapter
from minipeft.files.names.to_old import with_old_names
from minipeft.files.reading import read_object
from minipeft.files.tensor_file import Entry, TensorFile
from minipeft.injection.build import PREFIX
from minipeft.readers.contents import Contents
from minipeft.readers.names import Reader
from minipeft.readers.written import Made


def under_old_names(
    reader: Reader, contents: Contents, base: Path | None, made: Made
) -> tuple[Contents, Mapping[str, Tensor]]:
    """The same adapter as PEFT would have saved it with transformers 4, and its tensors.

    Raises:
        MinipeftError: the base is not known here, the adapter does not fit it, or the reader knows other names.
    """
    if reader in (Reader.MLX, Reader.DIFFUSERS):
        raise CheckpointError(
            f"{contents.directory}: {reader.value} has its own names, and none for one expert or those of transformers 4. "
            "Merge the adapter: minipeft merge."
        )
    weights, folder = contents.weights, _base(contents, base)
    config = config_from_dict(dict(contents.config))
    file = open_adapter(contents.directory)
    entries = {key: entry for key, entry in file.entries.items() if key in weights.entries}  # some may be dropped
    file = replace(file, entries=entries, config=config)
    auto_mapping: Any = contents.config.get("auto_mapping")
    model = empty_model(folder, read_object(folder / CONFIG), file, auto_mapping).model
    tensors, options = with_old_names(model, file, contents.config)
    renamed = [key for key in tensors if key not in weights.shapes]
    if renamed:
        made.done.append(
            f"{len(renamed)} tensors have names of transformers 4, such as {renamed[0].removeprefix(PREFIX)}."
        )
    entries = {key: Entry(tuple(t.shape), NAMES[t.dtype], (key,)) for key, t in tensors.items()}
    return Contents(contents.directory, options, TensorFile(weights.path, entries, weights.metadata)), tensors


def _base(contents: Contents, base: Path | None) -> Path:
    """The directory with the base's configuration."""
    named = contents.config.get("base_model_name_or_path")
    found = base if base is not None else cached(named) if isinstance(named, str) else None
    if found is None or not os.path.isfile(found / CONFIG):
        raise CheckpointError(
            f"{contents.directory}: which names its modules had depends on the base, and there is no {CONFIG} of it in "
            f"{found or named!s:.200}. Give its directory with --base."
        )
    return found
