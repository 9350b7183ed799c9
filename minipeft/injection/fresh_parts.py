"""Parts of a model that its checkpoint lacks, such as a new classification head, which `from_pretrained` drew at random.

Whoever loads the base again gets other values, so an adapter has to bring these parts along. Where a model does not say
what it was loaded with, its weights are of unknown origin, and `minipeft.files.base_samples` compares them on loading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from minipeft.config.adapter_config import HEADS_OF_TASK, AdapterConfig
from minipeft.ecosystem.transformers_model import (
    base_model,
    computed_parameters,
    is_from_checkpoint,
    loadable_parts,
    output_head,
    vocabulary_tables,
)
from minipeft.ecosystem.wrapper_names import named_modules
from minipeft.errors import shown, warn
from minipeft.injection.module_tree import Candidate, candidates, is_callable
from minipeft.injection.targets import Selection, within
from minipeft.layers.offloaded import offloads

ORIGINS = "_minipeft_origins"  # their name in an adapted model's __dict__, which is copied and pickled with the model


@dataclass(frozen=True)
class Origins:
    """Full names of base parameters: those that the checkpoint lacks, and those of which that is not known."""

    fresh: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()

    @property
    def all_known(self) -> bool:
        """Whether no parameter is new or may be."""
        return not self.fresh and not self.unknown


@dataclass(frozen=True)
class FreshParts:
    """Modules, by name, that are new in a model: those that train in full, and those that are only saved."""

    trained: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def base_parameters(model: nn.Module, found: Mapping[str, Candidate]) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every (full name, owner, parameter) of a base, without the adapters on it."""
    seen: set[int] = set()
    owners = [("", model)]
    for name, candidate in found.items():
        base = candidate.base
        inner = named_modules(base) if base is not candidate.module and base._modules else [("", base)]
        owners += [(f"{name}.{path}" if path else name, module) for path, module in inner]
    for name, owner in owners:
        for own, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{name}.{own}" if name else own), owner, parameter


def find_origins(model: nn.Module, found: Mapping[str, Candidate] | None = None) -> Origins:
    """Which parameters of a base come from its checkpoint, as it was when it was first adapted.

    `found` are the model's `candidates`, if they have been found already.
    """
    remembered = model.__dict__.get(ORIGINS)
    if isinstance(remembered, Origins):
        return remembered
    found = candidates(model) if found is None else found
    unknown = {name: p for name, owner, p in base_parameters(model, found) if _is_plain(p, owner)}
    fresh: set[str] = set()
    for part in loadable_parts(model):
        # What accelerate offloads has lost its mark: others stand in its place.
        inside = {id(p) for p in part.parameters() if not p.is_meta}
        new = drawn_at_random(part, {name: p for name, p in unknown.items() if id(p) in inside})
        if new is not None:
            fresh.update(new)
            unknown = {name: p for name, p in unknown.items() if id(p) not in inside}
    return Origins(frozenset(fresh), frozenset(unknown))


def drawn_at_random(part: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[str] | None:
    """Which of these parameters of a part its checkpoint lacks, by the marks of `from_pretrained`.

    None if most have no mark: the part was changed since, or does not come from a checkpoint, so nothing is known.
    """
    unmarked = [name for name, parameter in parameters.items() if not is_from_checkpoint(parameter)]
    if 2 * len(unmarked) > len(parameters):
        return None
    computed = computed_parameters(part)
    return [name for name in unmarked if computed is None or not computed.search(name)]


def _is_plain(parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Whether this process has the whole of it, as floats; a quantized or sharded weight has a type of its own."""
    there = not parameter.is_meta or offloads(owner)
    return type(parameter) is nn.Parameter and parameter.is_floating_point() and there


def find_fresh_parts(
    model: nn.Module, config: AdapterConfig, found: dict[str, Candidate], origins: Origins
) -> FreshParts:
    """The new modules that `config` leaves out of `modules_to_save`.

    All of them train with a classification task, and one that is targeted trains in any case: low rank on top of random
    weights has no use. But a targeted layer in a block that is otherwise the checkpoint's was not drawn at random: someone
    gave it another weight, and it is adapted like the others.
    """
    task = config.task_type in HEADS_OF_TASK
    if not origins.fresh and not (task and origins.unknown):
        return FreshParts()
    selection = Selection(model, config, found)
    saved = set(selection.saved)
    free = {
        name: candidate
        for name, candidate in found.items()
        if not within(name, saved) and not any(within(other, {name}) for other in saved)
    }
    fresh = set(_topmost_fresh(model, found, free, origins.fresh)) if origins.fresh else set()
    if task and origins.unknown:
        fresh |= {name for name in _beside_base_model(model, found, free, origins.unknown) if not within(name, fresh)}
    parts = [name for name in found if name in fresh]
    inside, all_train = _in_loaded_blocks(model, found, parts, origins.fresh), task or config.bias == "all"
    targets = {*selection.targets, *selection.parameters} if inside or (parts and not all_train) else set()
    parts = [name for name in parts if name not in inside or name not in targets]
    if all_train or not parts:
        return FreshParts(tuple(parts))
    trained = tuple(name for name in parts if any(within(target, {name}) for target in targets))
    return FreshParts(trained, tuple(name for name in parts if name not in trained))


def _topmost_fresh(
    model: nn.Module, found: Mapping[str, Candidate], free: Mapping[str, Candidate], fresh: Collection[str]
) -> list[str]:
    """The largest modules all of whose parameters are new, without the tables of the vocabulary."""
    tables = {id(module) for module in vocabulary_tables(model)}
    new = {id(p) for name, _, p in base_parameters(model, found) if name in fresh}
    whole = {
        name
        for name, candidate in free.items()
        if is_callable(candidate.base)
        and id(candidate.module) not in tables
        and any(True for _ in candidate.base.parameters())
        and all(id(p) in new for p in candidate.base.parameters())
    }
    return [name for name in free if name in whole and not within(name.rpartition(".")[0], whole)]


def _in_loaded_blocks(
    model: nn.Module, found: Mapping[str, Candidate], parts: Collection[str], fresh: Collection[str]
) -> set[str]:
    """Those of these parts that stand next to layers of the checkpoint in a numbered block, as in ``layers.0.mlp``."""
    if not parts:
        return set()
    layers = {name.rpartition(".")[0] for name, _, _ in base_parameters(model, found) if name not in fresh}
    loaded = {layer.rpartition(".")[0] for layer in layers}
    around = {name: name.rpartition(".")[0] for name in parts}
    return {name for name, block in around.items() if block in loaded and any(map(str.isdecimal, block.split(".")))}


def _beside_base_model(
    model: nn.Module, found: Mapping[str, Candidate], free: Mapping[str, Candidate], unknown: Collection[str]
) -> list[str]:
    """What stands beside the base model in a model with a head: DistilBERT's pre_classifier, wav2vec2's projector.

    Without layers whose weights the base model uses too, as a head may that is tied to the embedding.
    """
    base = base_model(model)
    if base is None:
        return []
    used = {id(parameter) for parameter in base.parameters()}
    names = {id(p): name for name, _, p in base_parameters(model, found)}
    head = output_head(model)
    return [
        name
        for name, candidate in free.items()
        if "." not in name
        and candidate.module is not head
        and is_callable(candidate.base)
        and any(names.get(id(p)) in unknown for p in candidate.base.parameters())
        and not any(id(p) in used for p in candidate.base.parameters())
    ]


def with_fresh_parts(config: AdapterConfig, parts: FreshParts) -> AdapterConfig:
    """The configuration with these parts in `modules_to_save`, by their full names, as PEFT reads them too."""
    names = (*parts.trained, *parts.kept)
    return dataclasses.replace(config, modules_to_save=(*(config.modules_to_save or ()), *names)) if names else config


def warn_of_fresh_parts(
    model: nn.Module, config: AdapterConfig, found: Mapping[str, Candidate], parts: FreshParts, origins: Origins
) -> None:
    """Name the new weights that are treated otherwise than the configuration asks, or cannot be saved."""
    if not origins.fresh and parts == FreshParts():
        return
    bare = [
        name
        for name, owner, _ in base_parameters(model, found)
        if name in origins.fresh and owner._modules and is_callable(owner)
    ]
    unasked = () if config.task_type in HEADS_OF_TASK else parts.trained
    for names, fate in (
        (parts.kept, "stays frozen as it is and is saved with the adapter; to train it, name it in modules_to_save"),
        (unasked, "is trained and saved in full, since an update on top of random weights has no use"),
        (bare, "is neither trained nor saved, as a parameter next to child modules"),
    ):
        if names:
            warn(
                f"{shown(names)}: not in the checkpoint of this {type(model).__name__}, so drawn at random when it was "
                f"loaded; it {fate}."
            )
