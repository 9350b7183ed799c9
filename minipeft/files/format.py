"""Opening an adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``, which belong together.

Both files must come from one save. So the safetensors metadata holds, under ``minipeft``, the configuration that the
weights were saved with, the digest of the configuration file that this save replaced, and samples of the base weights.
With these a reader can tell an interrupted save, for which it takes the configuration in the weights, from two files
that were mixed by hand, which it refuses. PEFT's files have no such metadata and open too, and so do those of other tools,
see `minipeft.files.formats`. A pickle is never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minipeft.config.adapter_config import AdapterConfig, config_from_dict
from minipeft.ecosystem.older_peft import in_todays_words
from minipeft.ecosystem.peft_options import asks_nothing
from minipeft.errors import CheckpointError, ConfigError, shown, told
from minipeft.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from minipeft.files.formats.diffusers import DIFFUSERS
from minipeft.files.formats.foreign import Source
from minipeft.files.formats.known import format_of, only_part, pickles_in, weights_in
from minipeft.files.not_an_adapter import config_named, folder_named, layout_named, local_names
from minipeft.files.reading import check_inside, object_in, read_object, reading
from minipeft.files.scaling_in_B import with_own_scaling
from minipeft.files.tensor_file import TensorFile, damaged, open_tensors

logger = logging.getLogger("minipeft")
VERSION = 1
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# What an adapter trains is floating point; a module trained in full may also have buffers that count.
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = {**FLOATS, **INTEGERS, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST = 1e39  # more than any float32
# Keys that say where a file comes from, not what its tensors mean.
PROVENANCE = {"base_model_name_or_path", "task_type", "inference_mode", "peft_version", "revision", "auto_mapping"}


@dataclass(frozen=True)
class AdapterFile(TensorFile):
    """The weights of an adapter directory, unread, with what was read and checked: its configuration and its base."""

    config: AdapterConfig
    base: Mapping[str, list[float]]  # samples of the base weights by module, see `minipeft.files.base_samples`
    kept: tuple[str, ...] = ()  # modules that it brings and that do not train, see `minipeft.injection.fresh_parts`
    is_own: bool = False  # whether minipeft wrote it
    said: Mapping[str, Any] = field(default_factory=dict)  # `CONFIG_FILE` as it is, with what no option says
    ties: bool = False  # whether ensure_weight_tying was asked for, of which PEFT must not know, see `own_metadata`


def unknown(component: str) -> None:
    """Stands in for a model's module names where there is no model."""


def open_adapter(directory: Path, modules: Callable[[str], Collection[str] | None] = unknown) -> AdapterFile:
    """Read the configuration and the header of the weights.

    Args:
        directory: as PEFT, minipeft or another tool wrote it.
        modules: the names of the model's modules, for formats that can only be read with them.

    Raises:
        CheckpointError: a file is missing, hostile or damaged, or the two come from different saves.
        ConfigError: the configuration asks for something that is not allowed or not implemented.
    """
    weights = open_weights(directory)
    values = config_in(directory)
    known = format_of(weights)
    if known is DIFFUSERS and values and "peft_type" in values:
        known = None  # keys without PEFT's prefix look like diffusers', but PEFT's configuration says what they mean
    if known is not None:
        part = only_part(source_of(weights, modules), known)
        logger.info("%s: read as a file of %s.", weights.path, known.name)
        config = config_from_dict(part.values, f"{weights.path}")
        return AdapterFile(weights.path, part.entries, {}, config=config, base={}, state=weights.state)
    own = _own(weights)
    values = _of_one_save(directory, values, own)
    if "peft_type" not in values and (what := config_named(values)):
        raise ConfigError(f"{directory / CONFIG_FILE} names no peft_type.{what}")
    if values.get("peft_type") == "OFT" and any(key.endswith(".oft_r") for key in weights.shapes):
        raise CheckpointError(
            f"{directory} holds OFT of PEFT before 0.16, which rotated in another way; nothing newer reads it. Train it again, or "
            "merge it with the PEFT that wrote it."
        )
    config = config_from_dict(values, f"{directory / CONFIG_FILE}")
    if "scaling" in own:
        weights, asked = with_own_scaling(weights, values, own["scaling"])
        config = config_from_dict(asked, f"{directory / CONFIG_FILE}")
    return AdapterFile(
        weights.path,
        weights.entries,
        weights.metadata,
        state=weights.state,
        config=config,
        base=own.get("base") or {},
        kept=tuple(own.get("kept", ())),
        is_own=bool(own),
        said=values,
        ties=bool(own.get("tied")),
    )


def _of_one_save(directory: Path, values: dict[str, Any] | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that the weights were saved with: the file's, or the one in the weights if the save was interrupted.

    Args:
        directory: of the adapter.
        values: the contents of `CONFIG_FILE`, if it is there.
        own: what `own_metadata` wrote into the weights.

    Raises:
        CheckpointError: there is none, or the two files come from different saves.
    """
    saved: dict[str, Any] | None = own.get("config")
    if values is None or saved is None:
        found = saved if values is None else values
        if found is None:
            raise CheckpointError(f"{directory} has no {CONFIG_FILE}.")
        return found
    if _digest(values) == _digest(saved):
        return values
    if _digest(values) != own.get("previous"):
        raise CheckpointError(
            f"{directory}: {CONFIG_FILE} and {WEIGHTS_FILE} come from different saves. Copy both from one save."
        )
    return saved  # the save was interrupted between the two renames


def source_of(
    weights: TensorFile, modules: Callable[[str], Collection[str] | None], directory: Path | None = None
) -> Source:
    """The weights of another tool with the configuration in its directory, by default next to them."""
    directory = weights.path.parent if directory is None else directory
    return Source(weights, directory, config_in(directory) or {}, modules)


def config_in(directory: Path) -> dict[str, Any] | None:
    """The contents of ``adapter_config.json``, as today's PEFT would have written them; None if there is none."""
    path = directory / CONFIG_FILE
    return in_todays_words(read_object(path)) if os.path.exists(path) else None


def open_weights(directory: Path) -> TensorFile:
    """The weights in an adapter's directory, unread, under the keys that they are stored by.

    Raises:
        CheckpointError: there are none, or they are hostile, damaged, or of another dtype than adapters have.
    """
    if not os.path.isdir(directory):  # unlike Path's, it answers False for names that are too long or hold a NUL
        raise CheckpointError(
            f"{directory} is not a directory; an adapter is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    with reading(directory):
        names = local_names(directory)
    ours = WEIGHTS_FILE in names or os.path.exists(directory / WEIGHTS_FILE)  # names may be cut off
    name = WEIGHTS_FILE if ours else weights_in([name for name in names if "/" not in name])
    for file in (name, CONFIG_FILE):
        check_inside(directory, file or "")
    weights = None if name is None else open_tensors(directory / name)
    if weights is None or (name != WEIGHTS_FILE and format_of(weights) is None):
        pickles = pickles_in(names)
        fix = f" {shown(pickles)} is a pickle, which is never read; `minipeft convert {directory}` makes safetensors of it."
        what = folder_named(names) or (layout_named(weights.path.name, weights.shapes) if weights else "")
        raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}.{fix if pickles else what}")
    for key, dtype in weights.dtypes.items():
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{weights.path}: {told(key, 200)} is {dtype}; adapters are floating point ({', '.join(FLOATS)})."
            )
    return weights


def _own(weights: TensorFile) -> dict[str, Any]:
    """What `own_metadata` wrote; empty for a file of PEFT's."""
    own = object_in(weights.metadata.get("minipeft", "{}"))
    if own is None or not _is_own(own):
        raise damaged(weights.path, f"its minipeft metadata is broken, or not of version {VERSION}")
    return own


def _is_own(own: Mapping[str, Any]) -> bool:
    if not all(isinstance(own.get(key, {}), dict) for key in ("config", "base", "scaling")):
        return False
    rows, kept = own.get("base", {}).values(), own.get("kept", [])
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        return False
    return own.get("version", VERSION) == VERSION and all(map(_is_sample, rows))


def _is_sample(row: Any) -> bool:
    """Whether a value of JSON, which has no NaN, can stand for base weights: a list of numbers no larger than a float32."""
    return isinstance(row, list) and {int, float}.issuperset(map(type, row)) and max(map(abs, row), default=0) < LARGEST


def own_metadata(
    config: Mapping[str, Any],
    base: Mapping[str, Any],
    kept: Sequence[str],
    directory: Path,
    scaling: Mapping[str, Any] | None,
    tied: bool,
) -> dict[str, str]:
    """Safetensors metadata for an adapter that is about to be written.

    `scaling` is what is in B, see `scaling_in_B`. `tied` says that the user asked for ``ensure_weight_tying``, and the
    configuration says False, since PEFT would drop what a tied head has besides its weight.
    """
    try:
        before = config_in(directory)
    except CheckpointError:
        before = None
    previous = None if before is None else _digest(before)
    own = {"version": VERSION, "config": dict(config), "previous": previous, "base": dict(base)}
    own |= {"kept": list(kept)} if kept else {}
    own |= {"scaling": dict(scaling)} if scaling else {}
    own |= {"tied": True} if tied else {}
    return {"format": "pt", "minipeft": json.dumps(own)}


def _digest(config: Mapping[str, Any]) -> str:
    meaning = {k: v for k, v in sorted(config.items()) if k not in PROVENANCE and not asks_nothing(v)}
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()
