"""Adapters of other tools, and pickles, as directories in PEFT's format: what ``minipeft convert`` does."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from minipeft.config.adapter_config import config_from_dict
from minipeft.errors import CheckpointError, shown
from minipeft.files.atomic import Pieces, write_files
from minipeft.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from minipeft.files.format import config_in, source_of, unknown
from minipeft.files.formats.foreign import Part
from minipeft.files.formats.known import format_of, is_one_file, parts, pickles_in, weights_in
from minipeft.files.formats.pickled import write_safetensors
from minipeft.files.not_an_adapter import folder_named, local_names
from minipeft.files.reading import MAX_CONFIG_BYTES, as_path, reading, writing
from minipeft.files.save import check_no_model_in, config_text
from minipeft.files.tensor_bytes import file_of
from minipeft.files.tensor_file import TensorFile, open_tensors

# Where a diffusers pipeline keeps what a file says "unet" for: newer ones have a transformer instead.
FOLDERS = {"unet": ("unet", "transformer")}


def convert(place: str | Path, out: str | Path | None = None, base: str | Path | None = None) -> list[Path]:
    """Write what a directory or file holds in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

    A pickle is read in a process of its own, see `minipeft.files.formats.pickled`. No model is loaded.

    Args:
        place: a directory that another tool wrote, or a file in one.
        out: where to; an adapter for several parts of a pipeline becomes one directory for each in it. None: next to an
            ``adapter_model.bin``, which stays.
        base: the model's directory or the pipeline's, for formats that need the names of its modules.

    Returns:
        The directories that were written.

    Raises:
        MinipeftError: there is nothing to convert, it is hostile or damaged, or a tensor has no place; nothing is written.
    """
    source = as_path(place, "place")
    target = None if out is None else as_path(out, "out")
    modules = unknown if base is None else modules_of(as_path(base, "base"))
    if target is not None:
        check_no_model_in(target)
    with reading(source):
        path = _weights(source)
        if path.suffix == ".safetensors":
            return _convert(open_tensors(path), path.parent, target, modules)
        if target is None:
            _check_free(path.parent)  # before another process is started in vain
        with tempfile.TemporaryDirectory() as folder:
            inner = Path(folder) / WEIGHTS_FILE
            write_safetensors(path, inner)
            return _convert(open_tensors(inner), path.parent, target, modules, pickle=path)


def _weights(place: Path) -> Path:
    """The file to read: safetensors if there are any, else the only pickle of an adapter."""
    if os.path.isfile(place) and is_one_file(place):
        return place
    if not os.path.isdir(place):
        raise CheckpointError(f"{place} is neither a directory nor the weights of an adapter.")
    names = sorted(os.listdir(place))
    name = WEIGHTS_FILE if WEIGHTS_FILE in names else weights_in(names)
    if name is not None:
        return place / name
    pickles = pickles_in(names)
    if len(pickles) != 1:
        fix = "; name one file." if pickles else f".{folder_named(local_names(place))}"
        raise CheckpointError(f"{place} holds {shown(pickles)} of the weights that can be converted{fix}")
    return place / pickles[0]


def _convert(
    weights: TensorFile,
    directory: Path,
    out: Path | None,
    modules: Callable[[str], Collection[str] | None],
    pickle: Path | None = None,
) -> list[Path]:
    known = format_of(weights)
    if known is None:
        return [_same_kind(weights, directory, out, pickle)]
    if out is None:
        raise CheckpointError(f"{directory} holds a file of {known.name}; say where to write the adapter to, as OUT.")
    found = parts(source_of(weights, modules, directory), known)
    # All is made before the first file is written; one part alone has no folder of its own.
    written = {name if len(found) > 1 else "": _as_peft(part, weights.path) for name, part in found.items()}
    for folder in written:
        _check_free(out / folder)
    write_files(
        out, {str(Path(folder, name)): part for folder, files in written.items() for name, part in files.items()}
    )
    return [out / folder for folder in written]


def _as_peft(part: Part, path: Path) -> dict[str, bytes | Pieces]:
    config = config_from_dict(part.values, f"{path}").to_dict()
    weights = file_of(TensorFile(path, part.entries, {}).read(), {"format": "pt"})
    return {CONFIG_FILE: config_text(config), WEIGHTS_FILE: weights}  # last what makes a folder one that is in use


def _same_kind(weights: TensorFile, directory: Path, out: Path | None, pickle: Path | None) -> Path:
    """PEFT's own pickle as safetensors: the keys and the configuration stay as they are."""
    if pickle is None:
        raise CheckpointError(
            f"{weights.path} is in PEFT's format already, or in none that is known.{folder_named(local_names(weights.path.parent))}"
        )
    if "peft_type" not in (config_in(directory) or {}):
        raise CheckpointError(
            f"{directory} has no {CONFIG_FILE} of PEFT's, and {pickle.name} is in no format that is known."
        )
    weights.read()  # refuses NaN and infinity
    target = directory if out is None else out
    _check_free(target)
    files = {}
    if out is not None:
        with (directory / CONFIG_FILE).open("rb") as file:
            files[CONFIG_FILE] = file.read(MAX_CONFIG_BYTES)
    files[WEIGHTS_FILE] = weights.path.read_bytes()
    with writing(target):
        write_files(target, files)
    return target


def _check_free(directory: Path) -> None:
    if os.path.exists(directory / WEIGHTS_FILE):
        raise CheckpointError(f"{directory} has an {WEIGHTS_FILE} already; give a folder without one.")


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
