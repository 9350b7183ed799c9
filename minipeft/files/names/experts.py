"""Files with one LoRA for each expert, as transformers 4 had its layers, for models with all experts in one parameter.

Gate and up of one expert are then two LoRAs of one matrix with the output features of both. Their ranks stand one after
the other, ``A = [A_gate; A_up]``, and B is block diagonal, so the update is the same, in PEFT's own layout. Fewer ranks are
filled with zeros. A file that does not hold all that its configuration selects is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest

from torch import Tensor, nn

from minipeft.config.patterns import endings
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import CheckpointError, printable, shown
from minipeft.files.format import AdapterFile
from minipeft.files.names.expert_config import with_parameters
from minipeft.files.names.expert_places import ExpertPlace, ExpertPlaces
from minipeft.files.names.fused_pair import FusedPair, Layer, fused_pair
from minipeft.files.tensor_file import Entry
from minipeft.injection.module_tree import Candidate
from minipeft.injection.targets import Selection, selected_names

FACTORS = ("lora_A", "lora_B")
ADVICE = "where only plain LoRA is the same. Merge the adapter where it was made, with transformers 4."
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
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
    places = ExpertPlaces(model, modules)
    found = _found(file, places)
    if not found:
        return file
    _check_plain(file, next(iter(found.values())))
    layers: dict[str, list[Layer]] = {}
    for layer in _with_configs(file, found, places.found):
        layers.setdefault(layer.place.name, []).append(layer)
    pairs = {name: fused_pair(file, own, places.found[own[0].place.module].base) for name, own in layers.items()}
    config = with_parameters(file.config, places.found, found, pairs)
    log.info(
        "%s: the LoRA of %d single layers, such as %s, is read as that of %d parameters, such as %s%s.",
        file.path.parent,
        len(found),
        printable(next(iter(found)), 200),
        len(pairs),
        next(iter(pairs)),
        ", and lora_dropout as 0, since it cannot act there" if getattr(file.config, "lora_dropout", 0) else "",
    )
    parameters = Selection(model, config, dict(places.found)).parameters
    factors, old = _by_key(parameters, pairs), {key for layer in found.values() for key in layer.keys.values()}
    others = {key: entry for key, entry in file.entries.items() if key not in old}
    if twice := [key for key in factors if key in others]:
        raise CheckpointError(f"{file.path} holds {printable(twice[0], 200)} twice, once under its old name.")
    base = {name: row for name, row in file.base.items() if name not in found}
    return replace(file, entries={**others, **factors}, config=config, base=base)


def _found(file: AdapterFile, places: ExpertPlaces) -> dict[str, Layer]:
    """The layers of the file that have a place in a bare parameter of the model, by name; refuses all but plain LoRA there."""
    found: dict[str, Layer] = {}
    today = set(getattr(file.config, "target_parameters", None) or ())
    for key in file.shapes:
        body = f".{key}".rpartition(f".{PREFIX}")[2].removeprefix(".")
        name, factor = _split(body)
        place = places.of(name) if name else None
        if place is None or (place.name == f"{name}.weight" and not today.isdisjoint(endings(place.name))):
            _check_no_other(file, key, body, places)
        elif found.setdefault(name, Layer(name, place, {})).keys.setdefault(factor, key) != key:
            raise CheckpointError(f"{file.path} holds {factor} of {printable(name, 200)} twice.")
    for name, layer in found.items():
        if len(layer.keys) < len(FACTORS):
            missing = next(factor for factor in FACTORS if factor not in layer.keys)
            raise CheckpointError(f"{file.path} lacks {missing} of {printable(name, 200)}.")
    return found


def _split(body: str) -> tuple[str, str]:
    """(layer, "lora_A" or "lora_B") of a key, in which the adapter's name may stand; ("", "") if it is another tensor."""
    parts = body.rsplit(".", 3)
    for place in (-2, -3) if parts[-1] == "weight" else ():
        if len(parts) >= 1 - place and parts[place] in FACTORS:
            return ".".join(parts[:place]), parts[place]
    return "", ""


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


def _check_plain(file: AdapterFile, layer: Layer) -> None:
    if file.config.method != "lora" or file.config.adapter_method != "lora":
        what = "all experts in one" if layer.place.expert is not None else "its weight as a bare"
        raise CheckpointError(
            f"{file.path.parent}: {file.config.adapter_method} adapts {printable(layer.name, 200)}, and this model has {what} "
            f"parameter, {ADVICE}"
        )


def _by_key(parameters: Mapping[str, list[str]], pairs: Mapping[str, FusedPair]) -> dict[str, Entry]:
    """Key in a file of today -> a factor. Of two parameters of one module the first is ``<module>.base_layer``."""
    return {
        f"{PREFIX}{module}{'.base_layer' * height}.{name}.weight": factor
        for module, own in parameters.items()
        for height, parameter in zip(reversed(range(len(own))), own, strict=True)
        if f"{module}.{parameter}" in pairs
        for name, factor in zip(FACTORS, pairs[f"{module}.{parameter}"].factors, strict=True)
    }


def _with_configs(file: AdapterFile, found: Mapping[str, Layer], modules: Mapping[str, Candidate]) -> list[Layer]:
    """The same layers with their configurations; refuses a file that has others than its configuration selects."""
    every: list[str] = []
    places = {name: layer.place for name, layer in found.items()}
    for around, (place, size) in _lists(file, places, modules).items():
        every += [str(number).join(around) for number in range(size)] if place.expert is not None else ["".join(around)]
    # A layer that was all experts already: only ``target_parameters`` could adapt it.
    whole = [name for name, place in places.items() if place.expert is None and _parameter(place, modules).ndim == 3]
    stacks = {name: f"{name}.weight" for name in whole}
    today = set(getattr(file.config, "target_parameters", None) or ())
    chosen = set(selected_names(file.config, [name for name in every if name not in stacks]))
    chosen |= {name for name, parameter in stacks.items() if not today.isdisjoint(endings(parameter))}
    missing = [name for name in every if name in chosen and name not in found]
    foreign = [name for name in found if name not in chosen]
    if missing or foreign:
        what = f"lacks {shown(missing, 3)}, which" if missing else f"holds {shown(foreign, 3)}, but not"
        raise CheckpointError(f"{file.path} {what} its configuration selects.")
    configs = file.config.for_modules([stacks.get(name, name) for name in found])
    return [replace(layer, config=configs[stacks.get(name, name)]) for name, layer in found.items()]


def _lists(
    file: AdapterFile, found: Mapping[str, ExpertPlace], modules: Mapping[str, Candidate]
) -> dict[tuple[str, str], tuple[ExpertPlace, int]]:
    """The old lists of experts: what stood around the index in a name -> (a place, how many experts the model has)."""
    parts: dict[tuple[str, int], tuple[str, str]] = {}
    lists: dict[tuple[str, str], tuple[ExpertPlace, int]] = {}
    for name, place in found.items():
        if parts.setdefault((place.name, place.part), place.around) != place.around:
            raise CheckpointError(
                f"{file.path} has two layers that are {place.name} in this model; one is {printable(name, 200)}."
            )
        size = len(_parameter(place, modules))
        if place.expert is not None and place.expert >= size:
            raise CheckpointError(
                f"{file.path} adapts {printable(name, 200)}, and {place.module} has {size} experts. Is it for another base?"
            )
        lists[place.around] = (place, size)
    return lists | _of_other_layers(lists, modules)


def _of_other_layers(
    lists: Mapping[tuple[str, str], tuple[ExpertPlace, int]], modules: Mapping[str, Candidate]
) -> dict[tuple[str, str], tuple[ExpertPlace, int]]:
    """The same lists of the layers of the model that are not in the file at all."""
    alike: dict[str, list[str]] = {}
    for module in modules:
        alike.setdefault(_NUMBER.sub("*", module), []).append(module)
    others: dict[tuple[str, str], tuple[ExpertPlace, int]] = {}
    patterns = {(_NUMBER.sub("*", before), behind): (before, place) for (before, behind), (place, _) in lists.items()}
    for (pattern, behind), (before, place) in patterns.items():
        if _NUMBER.findall(before) != _NUMBER.findall(place.module):
            continue  # the layers were counted in another way
        for module in alike[_NUMBER.sub("*", place.module)]:
            pieces = zip_longest(pattern.split("*"), _NUMBER.findall(module), fillvalue="")
            around = ("".join(map("".join, pieces)), behind)
            parameter = modules[module].base._parameters.get(place.parameter)
            if around not in lists and parameter is not None:
                others[around] = (replace(place, module=module, around=around), len(parameter))
    return others


def _parameter(place: ExpertPlace, modules: Mapping[str, Candidate]) -> Tensor:
    return modules[place.module].base._parameters[place.parameter]  # type: ignore[return-value]
