"""Files with one LoRA for each expert, as transformers 4 had its layers, for models with all experts in one parameter.

Gate and up of one expert are then two LoRAs of one matrix with the output features of both. Their ranks stand one after
the other, ``A = [A_gate; A_up]``, and B is block diagonal, so the update is the same, in PEFT's own layout. Fewer ranks are
filled with zeros. A file that does not hold all that its configuration selects is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from minipeft.config import AdapterConfig
from minipeft.errors import CheckpointError, printable
from minipeft.files.format import AdapterFile
from minipeft.files.names.expert_config import with_parameters
from minipeft.files.names.expert_lists import layer_configs
from minipeft.files.names.expert_places import Places
from minipeft.files.names.fused_pair import FusedPair, Layer, fused_pair
from minipeft.files.tensor_file import Entry
from minipeft.injection.build import PREFIX
from minipeft.injection.module_tree import Candidate
from minipeft.injection.targets import select_parameters
from minipeft.patterns import endings

FACTORS = ("lora_A", "lora_B")
ADVICE = (
    "in one parameter, where only plain LoRA is the same. Merge the adapter where it was made, with transformers 4."
)
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
    places = Places(model, modules)
    found = _found(file, places)
    if not found:
        return file
    _check_plain(file, next(iter(found)))
    layers: dict[str, list[Layer]] = {}
    for name, config in layer_configs(file, {name: layer.place for name, layer in found.items()}, places.found).items():
        layers.setdefault(found[name].place.name, []).append(replace(found[name], config=config))
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
    return _with_pairs(
        file, config, found, _by_key(select_parameters(model, config, dict(places.found), every_pattern=False), pairs)
    )


def _found(file: AdapterFile, places: Places) -> dict[str, Layer]:
    """The layers of the file that have a place in a bare parameter of the model, by name.

    Raises:
        CheckpointError: one has another tensor than the two factors of LoRA, or only one of them.
    """
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


def _check_no_other(file: AdapterFile, key: str, body: str, places: Places) -> None:
    """Refuse other tensors of a layer that is a part of a parameter in the model."""
    name = body
    for _ in range(3):
        name = name.rpartition(".")[0]
        place = places.of_expert(name)
        if place is not None:
            raise CheckpointError(
                f"{file.path} holds {printable(key, 200)}, and this model has {place.parameter} of all experts {ADVICE}"
            )


def _check_plain(file: AdapterFile, name: str) -> None:
    if file.config.method != "lora" or file.config.adapter_method != "lora":
        raise CheckpointError(
            f"{file.path.parent}: {file.config.adapter_method} adapts {printable(name, 200)}, and this model has all experts "
            f"{ADVICE}"
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


def _with_pairs(
    file: AdapterFile,
    config: AdapterConfig,
    found: Mapping[str, Layer],
    factors: Mapping[str, Entry],
) -> AdapterFile:
    """The file with these factors, by key, in the place of those that were found."""
    old = {key for layer in found.values() for key in layer.keys.values()}
    others = {key: entry for key, entry in file.entries.items() if key not in old}
    if twice := [key for key in factors if key in others]:
        raise CheckpointError(f"{file.path} holds {printable(twice[0], 200)} twice, once under its old name.")
    base = {name: row for name, row in file.base.items() if name not in found}
    return replace(file, entries={**others, **factors}, config=config, base=base)
