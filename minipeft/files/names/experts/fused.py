"""Reading a file with one LoRA for each expert into a model that has all experts in one parameter.

Gate and up of one expert are then two LoRAs of one matrix with the output features of both. Their ranks stand one after
the other, ``A = [A_gate; A_up]``, and B is block diagonal, so the update is the same, in PEFT's own layout. Fewer ranks are
filled with zeros. A file that does not hold all that its configuration selects is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from minipeft.config.patterns import matching
from minipeft.ecosystem.wrapper_names import PREFIX, nested_names
from minipeft.errors import CheckpointError, printable
from minipeft.files.format import AdapterFile
from minipeft.files.names.experts.complete import check_complete, name_in_options
from minipeft.files.names.experts.config import with_parameters
from minipeft.files.names.experts.pair import FACTORS, FusedPair, OldLayer, fused_pair
from minipeft.files.names.experts.places import ExpertPlace, ExpertPlaces
from minipeft.files.tensor_file import Entry
from minipeft.injection.module_tree import Candidate
from minipeft.injection.targets import Selection

ADVICE = "where only plain LoRA is the same. Merge the adapter where it was made, with transformers 4."
log = logging.getLogger("minipeft")


def fused_experts(file: AdapterFile, model: nn.Module, modules: Mapping[str, Candidate]) -> AdapterFile:
    """The same adapter for a model that has the experts in one parameter; the file itself if it needs none of this.

    Nothing is read: the new tensors are made when they are. The configuration names the parameters in
    ``target_parameters``, with their ranks and alphas in the pattern tables. ``lora_dropout`` is set to 0, since a
    parameter has no input on which it could act. `modules` are the model's `candidates`.

    Raises:
        CheckpointError: experts are adapted by more than plain LoRA, or only in part of what the configuration selects,
            or the shapes do not fit.
    """
    if not any(p is not None and p.ndim == 3 for c in modules.values() for p in c.base._parameters.values()):
        return file
    layers = _old_layers(file, ExpertPlaces(model, modules), modules)
    if not layers:
        return file
    check_complete(file, layers, modules)
    by_parameter: dict[str, list[OldLayer]] = {}
    for layer in layers.values():
        by_parameter.setdefault(layer.place.name, []).append(layer)
    pairs = {name: fused_pair(file, own, modules[own[0].place.module].base) for name, own in by_parameter.items()}
    config = with_parameters(file.config, modules, layers, pairs)
    log.info(
        "%s: the LoRA of %d single layers, such as %s, is read as that of %d parameters, such as %s%s.",
        file.path.parent,
        len(layers),
        printable(next(iter(layers)), 200),
        len(pairs),
        next(iter(pairs)),
        ", and lora_dropout as 0, since it cannot act there" if getattr(file.config, "lora_dropout", 0) else "",
    )
    factors = _by_key(Selection(model, config, dict(modules)).parameters, pairs)
    old = {key for layer in layers.values() for key in layer.keys.values()}
    others = {key: entry for key, entry in file.entries.items() if key not in old}
    if twice := [key for key in factors if key in others]:
        raise CheckpointError(f"{file.path} holds {printable(twice[0], 200)} twice, once under its old name.")
    base = {name: row for name, row in file.base.items() if name not in layers}
    return replace(file, entries={**others, **factors}, config=config, base=base)


def _old_layers(file: AdapterFile, places: ExpertPlaces, modules: Mapping[str, Candidate]) -> dict[str, OldLayer]:
    """The layers of the file that have a place in a bare parameter of the model, by name; refuses all but plain LoRA there."""
    found: dict[str, ExpertPlace] = {}
    keys: dict[str, dict[str, str]] = {}
    for key in file.shapes:
        body = f".{key}".rpartition(f".{PREFIX}")[2].removeprefix(".")
        name, factor = _layer_and_factor(body)
        place = places.of(name) if name else None
        if place is None or _is_of_today(file, name, place):
            _check_no_other(file, key, body, places)
            continue
        found[name] = place
        if keys.setdefault(name, {}).setdefault(factor, key) != key:
            raise CheckpointError(f"{file.path} holds {factor} of {printable(name, 200)} twice.")
    for name in found:
        if missing := [factor for factor in FACTORS if factor not in keys[name]]:
            raise CheckpointError(f"{file.path} lacks {missing[0]} of {printable(name, 200)}.")
    for name, place in found.items():
        _check_plain(file, name, place)
    options = {name: name_in_options(name, place, modules) for name, place in found.items()}
    configs = file.config.for_modules(list(options.values()))
    return {name: OldLayer(name, place, keys[name], configs[options[name]]) for name, place in found.items()}


def _layer_and_factor(body: str) -> tuple[str, str]:
    """(layer, "lora_A" or "lora_B") of a key, in which the adapter's name may stand; ("", "") if it is another tensor."""
    parts = body.rsplit(".", 3)
    for place in (-2, -3) if parts[-1] == "weight" else ():
        if len(parts) >= 1 - place and parts[place] in FACTORS:
            return ".".join(parts[:place]), parts[place]
    return "", ""


def _is_of_today(file: AdapterFile, name: str, place: ExpertPlace) -> bool:
    """Whether a name is today's of a module, whose weight ``target_parameters`` selects as it does today."""
    return place.name == f"{name}.weight" and bool(matching(file.config.target_parameters or (), [place.name]))


def _check_no_other(file: AdapterFile, key: str, body: str, places: ExpertPlaces) -> None:
    """Refuse other tensors of a layer that is a part of a parameter in the model."""
    name = body
    for _ in range(3):
        name = name.rpartition(".")[0]
        place = places.of_expert(name)
        if place is not None:
            raise CheckpointError(
                f"{file.path} holds {printable(key, 200)}, and this model has {place.parameter} of all experts in one "
                f"parameter, {ADVICE}"
            )


def _check_plain(file: AdapterFile, name: str, place: ExpertPlace) -> None:
    if file.config.method != "lora" or file.config.adapter_method != "lora":
        what = "all experts in one" if place.expert is not None else "its weight as a bare"
        raise CheckpointError(
            f"{file.path.parent}: {file.config.adapter_method} adapts {printable(name, 200)}, and this model has {what} "
            f"parameter, {ADVICE}"
        )


def _by_key(parameters: Mapping[str, Collection[str]], pairs: Mapping[str, FusedPair]) -> dict[str, Entry]:
    """Key in a file of today -> a factor."""
    return {
        f"{PREFIX}{nested}.{factor}.weight": entry
        for module, own in parameters.items()
        for parameter, nested in nested_names(module, own).items()
        if f"{module}.{parameter}" in pairs
        for factor, entry in zip(FACTORS, pairs[f"{module}.{parameter}"].factors, strict=True)
    }
