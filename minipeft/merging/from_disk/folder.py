"""The directory of the merged model: made beside its place, and put there when it is complete."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minipeft.errors import CheckpointError, told_error
from minipeft.files.atomic import hidden_beside, orphans, sync_folder, write_and_sync
from minipeft.files.base_checkpoint import CONFIG, INDEX
from minipeft.files.reading import read_limited, writing
from minipeft.merging.from_disk.base import Base
from minipeft.merging.from_disk.shards import Entry

MAX_SMALL = 2**26  # bytes; the largest tokenizers have half of that
FOLDERS = ("additional_chat_templates",)
# Weights in any format, files of a training run, and the card that describes the base.
LEFT_OUT = {
    *(".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".ot"),
    *(".onnx", ".onnx_data", ".npz", ".npy", ".tflite", ".joblib", ".dill", ".mlmodel", ".tar", ".zip", ".gz"),
}
NOT_THE_MODELS = {CONFIG, INDEX, "README.md", "trainer_state.json", "adapter_config.json", "all_results.json"}
PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # as files of torch.save and pickle begin
TOKENIZER = "tokenizer_config.json"  # every tokenizer of transformers has it
OF_TOKENIZERS = {
    *(
        "tokenizer.json",
        TOKENIZER,
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
}


def check_place(out: Path, *sources: Path) -> None:
    """Raise CheckpointError unless a directory can be made here; it may not lie in one of the `sources`, which are read."""
    with writing(out):
        if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
            raise CheckpointError(f"{out} exists and is not an empty directory; name a new one.")
        real = Path(os.path.realpath(out))
        if (
            os.path.islink(out) or os.path.ismount(out) or str(real) == os.getcwd()
        ):  # the finished one cannot replace it
            raise CheckpointError(
                f"{out} is a link, a mount point or the current directory; name a new directory in it."
            )
    for source in (Path(os.path.realpath(source)) for source in sources):
        if real == source or source in real.parents:
            raise CheckpointError(f"{out} lies in {source}, which is read; name a directory elsewhere.")


@contextlib.contextmanager
def whole_folder(out: Path, needed: int) -> Iterator[Path]:
    """A directory to fill, which takes its place if the block ends without an error, and is gone otherwise.

    Raises CheckpointError if the disk has less than is `needed`, or the place cannot be written.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in orphans(out, "merge"):  # of merges to the same place that were killed
            shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(out.parent).free
        if needed > free:
            raise CheckpointError(f"{out}: {needed:,} bytes are needed and {free:,} are free.")
        folder = hidden_beside(out, "merge")
        folder.mkdir()
    try:
        yield folder
        with writing(out):
            sync_folder(folder)
            if os.path.isdir(out):
                out.rmdir()
            os.replace(folder, out)
            sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({told_error(error)}).") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def small_files(base: Path, adapter: Path) -> dict[str, Path]:
    """The files that go with the weights: name in the merged model -> where it is now.

    A tokenizer that was saved with the adapter is the one that it was trained with, so it takes the place of the base's.
    """
    found = {name: base / name for name in _names(base)}
    if os.path.isfile(adapter / TOKENIZER):
        found = {name: path for name, path in found.items() if name not in OF_TOKENIZERS}
        found |= {name: adapter / name for name in _names(adapter) if name in OF_TOKENIZERS}
    return {name: path for name, path in sorted(found.items()) if _is_small_text(path)}


def _names(folder: Path) -> list[str]:
    names = os.listdir(folder)
    for inner in FOLDERS:
        names += [f"{inner}/{name}" for name in os.listdir(folder / inner)] if os.path.isdir(folder / inner) else []
    return [name for name in names if _goes_along(name) and os.path.isfile(folder / name)]


def _goes_along(name: str) -> bool:
    path = Path(name)
    weights = name.endswith(".index.json") or path.suffix.lower() in LEFT_OUT
    return not weights and not path.name.startswith(".") and path.name not in NOT_THE_MODELS


def _is_small_text(path: Path) -> bool:
    if os.path.getsize(path) > MAX_SMALL:
        return False
    with path.open("rb") as file:
        return not file.read(4).startswith(PICKLED)


def write_small_files(folder: Path, base: Base, files: Mapping[str, Path], changed: Mapping[str, Any]) -> None:
    """Copy the files that go with the weights, and write the configuration; unless it changes, byte for byte."""
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_and_sync(folder / name, read_limited(path, MAX_SMALL))
    if changed:
        payload = (json.dumps({**base.config, **changed}, indent=2) + "\n").encode()
    else:
        payload = read_limited(base.folder / CONFIG, MAX_SMALL)
    write_and_sync(folder / CONFIG, payload)


def write_index(folder: Path, base: Base, shards: Mapping[str, list[Entry]]) -> None:
    """Write which tensor is in which file, if the base has such an index."""
    if base.index is None:
        return
    entries = [entry for shard in shards.values() for entry in shard]
    known = base.index.get("metadata")
    metadata = dict(known) if isinstance(known, dict) else {}
    metadata["total_size"] = sum(entry.nbytes for entry in entries)
    if "total_parameters" in metadata:
        before = sum(math.prod(tensor.shape) for tensor in base.tensors.values())
        metadata["total_parameters"] += sum(math.prod(entry.shape) for entry in entries) - before
    places = {entry.key: name for name, shard in shards.items() for entry in shard}
    index = {**base.index, "metadata": metadata, "weight_map": dict(sorted(places.items()))}
    write_and_sync(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
