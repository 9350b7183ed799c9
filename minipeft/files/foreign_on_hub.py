"""Repositories on the hub with an adapter of another tool: which files to download, known before the large one is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi

from minipeft.errors import CheckpointError
from minipeft.files.file_names import CONFIG_FILE
from minipeft.files.formats.known import NAMES, format_of, weights_in
from minipeft.files.not_an_adapter import folder_named
from minipeft.files.tensor_file import Entry, TensorFile, open_tensors

# What a tool writes next to its weights, and says what they mean.
BESIDE = (CONFIG_FILE, "config.json", "hyperparameters.yaml", "model_config.yaml")


def weights_of_another_tool(
    names: Sequence[str], inner: str, repo_id: str, commit: str | None, token: str | bool | None
) -> str | None:
    """The file with an adapter of a format that is known; None if there is none, or several.

    Only the header of a file with a name of its own is asked for, since it may be a whole model. `inner` is the folder
    in the repository, with ``/`` behind it.
    """
    flat = [name for name in names if "/" not in name]
    found = weights_in(flat)
    if found is None or found in NAMES or _is_adapter(f"{inner}{found}", flat, repo_id, commit, token):
        return found
    return None


def is_of_another_tool(path: Path) -> bool:
    """Whether a file of weights is of a known format that is not PEFT's."""
    with contextlib.suppress(CheckpointError):  # which is told when it is read
        return format_of(open_tensors(path)) is not None
    return False


def _is_adapter(path: str, names: Sequence[str], repo_id: str, commit: str | None, token: str | bool | None) -> bool:
    if folder_named(names):  # such as a whole model
        return False
    with contextlib.suppress(Exception):  # of the hub, or of a header that is none
        found = HfApi(token=token, library_name="minipeft").parse_safetensors_file_metadata(
            repo_id, path, revision=commit
        )
        entries = {key: Entry(tuple(info.shape), info.dtype, (key,)) for key, info in found.tensors.items()}
        return format_of(TensorFile(Path(path), entries, found.metadata)) is not None
    return False


def first_in_cache(download: Callable[[str], object]) -> str | None:
    """The name of another tool's weights that are in the cache already; None if there are none."""
    for name in NAMES:
        with contextlib.suppress(Exception):  # it is not there
            download(name)
            return name
    return None
