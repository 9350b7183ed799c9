"""Layers that PEFT takes for parts of fused experts, because transformers 4 had experts under their names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from minipeft.config.patterns import first_keys
from minipeft.errors import CheckpointError
from minipeft.files.base_checkpoint import CONFIG, cached
from minipeft.files.readers.contents import Contents
from minipeft.files.readers.facts import one_of
from minipeft.files.reading import read_object

PARTS = ("gate_proj", "up_proj", "down_proj")
OPTIONS = ("lora_dropout", "use_dora", "lora_bias")  # that PEFT refuses for parameters
# _MODEL_TO_CONVERSION_PATTERN in transformers/conversion_mapping.py, transformers 5.24: the types that PEFT converts as "qwen2_moe".
TYPES = frozenset(
    "afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe "  # noqa: SIM905
    "glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe "
    "qwen3_omni_moe_text qwen3_omni_moe_thinker sarvam_mla solar_open".split()
)


def taken_for_experts(contents: Contents) -> str | None:
    """Layers, such as those of shared experts, whose targets PEFT turns into parameters of the routed experts."""
    names = _taken(contents)
    return None if _not_for_parameters(contents, names) else one_of(names)


def refused_for_experts(contents: Contents) -> str | None:
    """The same, where PEFT cannot do with parameters what the configuration asks for."""
    names = _taken(contents)
    return one_of(names) if _not_for_parameters(contents, names) else None


def _not_for_parameters(contents: Contents, names: list[str]) -> bool:
    parts = {name.rpartition(".")[2] for name in names}
    return any(contents.config.get(option) for option in OPTIONS) or len(parts & {"gate_proj", "up_proj"}) == 1


def _taken(contents: Contents) -> list[str]:
    if contents.method != "LORA" or not _is_converted(contents):
        return []
    names = [name for name in contents.layers if name.rpartition(".")[2] in PARTS]
    selected = contents.selected("target_modules", names)
    return [name for name in names if name in selected]


def _is_converted(contents: Contents) -> bool:
    """Whether PEFT converts the configuration; if nothing says what the base is, by the name that most of these have.

    A file with names of transformers 4 is for its readers.
    """
    if any(re.search(r"\.experts\.\d+\.", name) for name in contents.layers):
        return False
    known = _model_type(contents)
    return any(".shared_experts." in name for name in contents.layers) if known is None else known in TYPES


def _model_type(contents: Contents) -> str | None:
    """The base's, if the adapter says it or the base is on this machine."""
    mapping, named = (contents.config.get(key) for key in ("auto_mapping", "base_model_name_or_path"))
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    parts = library.split(".") if isinstance(library, str) else []
    if parts[:2] == ["transformers", "models"] and len(parts) > 2:
        return parts[2]
    folder = cached(named) if isinstance(named, str) and named else None
    try:
        found = None if folder is None else read_object(folder / CONFIG).get("model_type")
    except CheckpointError:
        return None
    return found if isinstance(found, str) else None


def _with_parameters(contents: Contents, table: str, names: list[str]) -> Any:
    """A table of ranks or alphas with the names of these layers' weights, of which PEFT asks it."""
    values = contents.config.get(table)
    if not isinstance(values, dict):
        return values
    found = first_keys(values, names, table)
    return {re.escape(f"{name}.weight"): values[key] for name, key in found.items()} | values


def as_parameters(contents: Contents, done: list[str]) -> Contents:
    """The same adapter with such layers under ``target_parameters``, which PEFT does not convert; what was done is added.

    PEFT has neither DoRA nor a bias there, so an adapter with one of these stays as it is.
    """
    names, config = _taken(contents), contents.config
    if not names or any(config.get(option) for option in ("use_dora", "lora_bias", "layer_replication")):
        return contents
    others = contents.selected("target_modules", list(contents.layers)) - {*names}
    changes: dict[str, Any] = {
        "target_modules": sorted(others - contents.selected("exclude_modules", list(contents.layers))),
        "target_parameters": [*contents.listed("target_parameters"), *(f"{name}.weight" for name in names)],
        "lora_dropout": 0.0,
    }
    changes |= {table: _with_parameters(contents, table, names) for table in ("rank_pattern", "alpha_pattern")}
    changes |= dict.fromkeys({"exclude_modules", "layers_to_transform", "layers_pattern"} & config.keys())
    done.append(f"{len(names)} layers are in target_parameters, as {names[0]}.weight, which PEFT reads.")
    if config.get("lora_dropout"):
        done.append("lora_dropout became 0, since it cannot act on a parameter.")
    return replace(contents, config={**config, **changes})
