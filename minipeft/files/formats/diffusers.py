"""diffusers' adapters: ``pytorch_lora_weights.safetensors``, for one or several parts of a pipeline.

The first word of a key names the part: ``unet.``, ``transformer.``, ``text_encoder.`` What follows is PEFT's key, or one of
three older forms; see ``diffusers/loaders/lora_base.py`` and ``diffusers/utils/state_dict_utils.py``. PEFT's configuration
is in the metadata under ``lora_adapter_metadata``; files without it are scaled by 1, or by an `alpha` per module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from minipeft.config.patterns import first_keys
from minipeft.errors import CheckpointError, told
from minipeft.files.formats.foreign import Format, Module, Part, Source, numbers, part, rank_of
from minipeft.files.reading import object_in
from minipeft.files.tensor_file import TensorFile

METADATA = "lora_adapter_metadata"
COMPONENTS = ("unet", "transformer", "transformer_2", "prior", "text_encoder", "text_encoder_2", "text_encoder_3")
_FIRST = tuple(f"{component}." for component in COMPONENTS)
_ENDS = {
    **{f"{down}.weight": "lora_A.weight" for down in ("lora_A", "lora.down", "lora_down", "lora_linear_layer.down")},
    **{f"{up}.weight": "lora_B.weight" for up in ("lora_B", "lora.up", "lora_up", "lora_linear_layer.up")},
    **{end: end for end in ("lora_B.bias", "lora_magnitude_vector", "alpha")},
}
_KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _ENDS))})")
# The oldest form: what was adapted stands in the name of the attention's processor.
_PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
# What minipeft must know of a configuration in the metadata; the rest says where the adapter comes from.
_KEPT = ("use_dora", "use_rslora", "lora_dropout")


def knows(file: TensorFile) -> bool:
    """Whether all keys name a part of a pipeline, or none does and the metadata is diffusers', and one is of LoRA."""
    named = [key.startswith(_FIRST) for key in file.shapes]
    return (all(named) or (not any(named) and METADATA in file.metadata)) and any("lora" in key for key in file.shapes)


def component_of(key: str) -> str:
    """The part of the pipeline that a key is for; a part that saved its own adapter names none."""
    return key.partition(".")[0] if key.startswith(_FIRST) else ""


def read(source: Source, component: str, keys: Sequence[str]) -> Part:
    """The adapter of one component."""
    file, metadata = source.file, _metadata(source, component)
    ends: dict[str, dict[str, str]] = {}
    for key in keys:
        name, end = _place(source, component, key)
        if end in ends.setdefault(name, {}):
            raise CheckpointError(f"{file.path}: {name} has {end} twice.")
        ends[name][end] = key
    alphas = [known["alpha"] for known in ends.values() if "alpha" in known]
    if alphas and metadata:
        raise CheckpointError(f"{file.path} has alpha both per module and in its metadata.")
    stored = numbers(file, alphas)
    given = _alphas(source, metadata, list(ends))
    modules = {}
    for name, known in ends.items():
        rank = rank_of(source, known.get("lora_A.weight", ""), known.get("lora_B.weight", ""))
        alpha = given.get(name, stored.get(known.get("alpha", ""), rank))
        tensors = {end: file.entries[key] for end, key in known.items() if end != "alpha"}
        modules[name] = Module(tensors, rank, alpha)
    values = {key: metadata[key] for key in _KEPT if key in metadata}
    return part(source, keys, modules, spent=alphas, known=source.modules(component), **values)


def _place(source: Source, component: str, key: str) -> tuple[str, str]:
    """The module that a key is for, and the end of PEFT's key."""
    inner = key.removeprefix(f"{component}.")
    processor = _PROCESSOR.fullmatch(inner)
    if processor is not None:
        is_text = component.startswith("text_encoder")
        layer = f"{processor[2]}_proj" if is_text else {"out": "to_out.0"}.get(processor[2], f"to_{processor[2]}")
        return f"{processor[1]}.{layer}", "lora_A.weight" if processor[3] == "down" else "lora_B.weight"
    match = _KEY.fullmatch(inner)
    if match is None:
        raise CheckpointError(f"{source.file.path}: {told(key, 200)} is not a key of diffusers' LoRA.")
    return match[1], _ENDS[match[2]]


def _metadata(source: Source, component: str) -> Mapping[str, Any]:
    """The configuration of one component in the file's metadata; empty if there is none."""
    text = source.file.metadata.get(METADATA)
    if text is None:
        return {}
    values = object_in(text)
    if values is None:
        raise CheckpointError(f"{source.file.path}: its metadata {METADATA} is not a JSON object.")
    first = f"{component}." if component else ""
    return {key.removeprefix(first): value for key, value in values.items() if key.startswith(first)}


def _alphas(source: Source, metadata: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Alpha by module as the metadata says it; empty if it says nothing."""
    if not metadata:
        return {}
    table, alpha = metadata.get("alpha_pattern") or {}, metadata.get("lora_alpha")
    numbers = [alpha, *table.values()] if isinstance(table, dict) else [None]
    if not all(isinstance(n, int | float) for n in numbers):
        raise CheckpointError(f"{source.file.path}: its metadata {METADATA} must say lora_alpha, not {told(alpha)}.")
    assert isinstance(alpha, int | float)
    keys = first_keys(table, names, "alpha_pattern")
    return {name: table[keys[name]] if name in keys else alpha for name in names}


DIFFUSERS = Format("diffusers", knows, read, component_of)
