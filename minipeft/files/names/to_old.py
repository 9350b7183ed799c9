"""The other way: an adapter under the names that transformers 4 had, which checkpoints and servers still have.

transformers 5 saves a model under these names, by its own tables read backwards, and the same tables are asked here. What
reads such a file is `minipeft.files.names.fitted`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import ALL_LINEAR, AdapterConfig
from minipeft.config.patterns import endings
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import CheckpointError, printable, shown
from minipeft.files.format import AdapterFile
from minipeft.files.names.conversions import conversions
from minipeft.files.names.experts.config import PATTERN_TABLES
from minipeft.files.names.experts.split import split_experts
from minipeft.files.names.fitted import in_names_of
from minipeft.files.names.modules import ModuleNames
from minipeft.files.names.places import Places
from minipeft.files.names.translated_config import translated_config
from minipeft.injection.module_tree import Candidate, candidates
from minipeft.injection.targets import selected_names
from minipeft.layers.base import layer_ops

_A = ".lora_A.weight"
# Modules that CLIP, SigLIP and their relatives had around their layers in transformers 4.
_DROPPED = ("text_model", "vision_model")
_EXPERT = re.compile(r"(.+)\.0\.([^.]+)\.weight")  # greedy: the index of the expert is the last number

# Classes for which the tables of transformers 5.24 do not lead back to the names that 4.57 had: those, and what they were.
_CORRECTED = {
    "AltCLIPModel": (r"^vision_model\.encoder\.layer\.", "vision_model.encoder.layers."),
    "AltCLIPTextModel": (r"^roberta\.encoder\.layers\.", "roberta.encoder.layer."),
    "MLCDVisionModel": (r"^(?!vision_model\.)", "vision_model."),
    "ViTMSNForImageClassification": (r"^encoder\.", "vit.encoder."),
}


@dataclass(frozen=True)
class OldNames:
    """The names of a model's modules in transformers 4."""

    found: Mapping[str, Candidate]  # the model's `candidates`
    modules: Mapping[str, str]  # name today -> name then
    experts: Mapping[str, tuple[str, ...]]  # parameter -> layers that each expert had, in the order of their features

    def is_router(self, name: str) -> bool:
        """Whether a module was a layer, and has a bare weight now."""
        weight = self.found[name].base._parameters.get("weight")
        return weight is not None and weight.ndim == 2 and layer_ops(self.found[name].base) is None

    def was_layer(self, name: str) -> bool:
        """Whether a module was a layer then, by its name today."""
        return layer_ops(self.found[name].base) is not None or self.is_router(name)

    def layers(self) -> Iterator[str]:
        """The names of all layers then: those of today, the routers, and those of each expert."""
        for name, old in self.modules.items():
            if self.was_layer(name):
                yield old
            for own, words in self.experts.items():
                stack = self.found[name].base._parameters.get(own)
                yield from (f"{old}.{n}.{word}" for n in range(0 if stack is None else len(stack)) for word in words)


def old_names(model: nn.Module) -> OldNames:
    """The old names, by transformers' tables; of a model without tables they are today's.

    Raises:
        CheckpointError: two lists of experts in it had other layers under one parameter's name.
    """
    found = candidates(model)
    modules, experts = _stored_names(model, found)
    wrong, right = next((_CORRECTED[c.__name__] for c in type(model).__mro__ if c.__name__ in _CORRECTED), ("^", ""))
    modules = {name: re.sub(wrong, right, old) for name, old in modules.items()}
    # Layers that were one then, as q, k and v in one matrix, had no names of their own.
    times = Counter(modules.values())
    return OldNames(found, {name: old for name, old in modules.items() if times[old] == 1}, experts)


def _stored_names(
    model: nn.Module, found: Mapping[str, Candidate]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """(module -> its name in the keys that transformers saves, parameter -> the layers of each expert there)."""
    renamings, converters = conversions(model, add_legacy=False)
    # Other prefixes are those of checkpoints of a larger model, and none of this one's.
    table = [e for e in (*renamings, *converters) if type(e).__name__ != "PrefixChange" or _was_a_module(e)]
    modules: dict[str, str] = {}
    experts: dict[str, tuple[str, ...]] = {}
    for name, candidate in found.items():
        for own, parameter in candidate.base._parameters.items():
            keys = _stored_keys(model, table, f"{name}.{own}", parameter) if parameter is not None else []
            lists = [match for key in keys if (match := _EXPERT.fullmatch(key))] if len(keys) > 1 else []
            if lists:
                modules[name] = lists[0][1]
                words = tuple(match[2] for match in lists)
                if experts.setdefault(own, words) != words:
                    raise CheckpointError(f"{name} had {shown(words)} for {own}, and other experts had {experts[own]}.")
            elif len(keys) == 1 and keys[0].endswith(f".{own}"):
                modules.setdefault(name, keys[0].removesuffix(f".{own}"))
    return modules, experts


def _was_a_module(change: Any) -> bool:
    """Whether a prefix that is removed today was a module's; in CLIPModel the part around it has that name itself."""
    around = (change.scope_prefix or "").rpartition(".")[2]
    return change.prefix_to_remove in _DROPPED and change.prefix_to_remove != around


def _stored_keys(model: Any, table: list[Any], name: str, parameter: Tensor) -> list[str]:
    """Under which keys transformers saves a parameter: its own name without a table, none if together with others."""
    if not table:
        return [name]
    from transformers.core_model_loading import revert_weight_conversion

    model._weight_conversions = table
    try:
        return list(revert_weight_conversion(model, {name: torch.empty_like(parameter, device="meta")}))
    except Exception:  # whatever a converter raises that lacks its other tensors
        return []
    finally:
        del model._weight_conversions


def with_old_names(
    model: nn.Module, file: AdapterFile, values: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of the same adapter, as PEFT would have saved it with transformers 4.

    What no option says of `values`, the file's ``adapter_config.json``, is kept.

    Raises:
        CheckpointError: the adapter is for another model, or has a place that had no name then.
    """
    file, names = in_names_of(model, file), old_names(model)
    places, moved, adapted = Places(model, file.config, names.found), dict[str, str](), set[str]()
    for key in file.shapes:
        place = places.place(key.removeprefix(PREFIX))
        if place is None or place.module not in names.modules:
            raise CheckpointError(
                f"{file.path}: {printable(key, 200)} had no name in {type(model).__name__} of transformers 4."
            )
        moved[key] = f"{PREFIX}{names.modules[place.module]}.{place.tail}"
        adapted |= {place.module} if places.is_adapters(place) else set()
    to_model = {old: name for name, old in names.modules.items()}
    config = translated_config(file.config, ModuleNames(model, names.found, to_model, adapted).swapped())
    config = _with_routers(config, [names.modules[name] for name in adapted if names.is_router(name)])
    whole = {moved[key]: tensor for key, tensor in file.read().items()}
    tensors, options = split_experts(whole, config, names.experts)
    wanted = {names.modules[name] for name in adapted if names.was_layer(name)}
    wanted |= {key.removeprefix(PREFIX).removesuffix(_A) for key in tensors if key not in whole and key.endswith(_A)}
    return tensors, {**values, **options, **_targets(config, wanted, names)}


def _with_routers(config: AdapterConfig, routers: Collection[str]) -> AdapterConfig:
    """The configuration with these as layers, and not as the parameters ``<name>.weight``."""
    if not routers:
        return config
    given: Any = config
    weights = [f"{name}.weight" for name in routers]
    entries = {ending for weight in weights for ending in endings(weight)}
    changes: dict[str, Any] = {
        "target_parameters": [e for e in given.target_parameters or () if e not in entries] or None
    }
    configs = given.for_modules(weights)
    for option, table in PATTERN_TABLES.items():
        others = {name: getattr(configs[f"{name}.weight"], option) for name in routers}
        changes[table] = {n: v for n, v in others.items() if v != getattr(given, option)} | getattr(given, table)
    return replace(config, **changes)


def _targets(config: AdapterConfig, wanted: Collection[str], names: OldNames) -> dict[str, Any]:
    """``target_modules`` for exactly these layers: as it is, else their shortest endings that no other layer has."""
    every, given = list(names.layers()), config.target_modules
    had_other_layers = names.experts or any(map(names.is_router, names.modules))
    known = given not in (None, ALL_LINEAR) or not had_other_layers
    if known and (given == ALL_LINEAR or set(selected_names(config, every)) == set(wanted)):
        return {"target_modules": given if isinstance(given, str) else list(given or ())}
    others = {ending for name in every if name not in wanted for ending in endings(name)}
    short = (
        next((end for end in sorted(endings(name), key=len) if end not in others and not end[0].isdigit()), name)
        for name in sorted(wanted)
    )
    unset = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return {**unset, "target_modules": list(dict.fromkeys(short))}
