"""A configuration whose patterns name a model's modules, as its old ones named those of the model it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.patterns import first_keys, selected
from minipeft.errors import TargetError
from minipeft.files.names.modules import ModuleNames
from minipeft.injection.module_tree import Candidate
from minipeft.injection.targets import Selection

# Options that select modules, with a rule of their own below.
SELECTING = frozenset({"target_modules", "exclude_modules", "modules_to_save"})


def translated_config(config: AdapterConfig, modules: ModuleNames) -> AdapterConfig:
    """The configuration that selects in this model what `config` selected in the model of the file.

    Patterns that do so as they are stay; others become lists of full names. The tensors say which modules are adapted,
    and so do the old patterns with the old names: if the file lacks tensors of a module that these select, it is refused,
    as it would be under its own names.
    """
    in_file = _View(modules.model, modules.in_file, modules.to_model)
    here = _View(modules.model, modules.here, {})
    parameters = in_file.parameters(config)
    owners = {name.rpartition(".")[0] for name in parameters}
    targets = (in_file.targets(config) | modules.adapted) - owners
    saved = in_file.saved(config)
    config = replace(config, **_tables(config, modules, [*sorted(targets), *sorted(parameters)]))
    if saved != here.saved(config):
        config = replace(config, modules_to_save=[name for name in modules.here if name in saved] or None)
    if parameters != here.parameters(config):
        option: dict[str, Any] = {"target_parameters": sorted(parameters) or None}
        config = replace(config, **option)
    if targets and targets != here.targets(config):
        listed = [name for name in modules.here if name in targets]
        unset: dict[str, Any] = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        config = replace(config, target_modules=listed, **unset)
    return config


@dataclass(frozen=True)
class _View:
    """A model whose modules have the names of `found`; what is selected there goes by its names `to_model`, if it has others."""

    model: nn.Module
    found: dict[str, Candidate]
    to_model: Mapping[str, str]

    def targets(self, config: AdapterConfig) -> set[str]:
        try:
            return {self._name(name) for name in Selection(self.model, config, self.found).targets}
        except TargetError:  # nothing is selected
            return set()

    def saved(self, config: AdapterConfig) -> set[str]:
        if config.modules_to_save is None:
            return set()
        return {self._name(name) for name in Selection(self.model, config, self.found).saved}

    def parameters(self, config: AdapterConfig) -> set[str]:
        chosen = Selection(self.model, config, self.found).parameters
        return {f"{self._name(name)}.{parameter}" for name, owned in chosen.items() for parameter in owned}

    def _name(self, name: str) -> str:
        return self.to_model.get(name, name)


def _tables(config: AdapterConfig, modules: ModuleNames, targets: Sequence[str]) -> dict[str, Any]:
    """The options that say something of single modules, with `targets` the names in the model."""
    old = {name: modules.name_in_file(name) for name in targets}
    changes: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if not value or field.name in SELECTING:
            continue
        if field.name in config.pattern_options:
            changes |= _by_pattern(field.name, value, old)
        elif isinstance(value, Mapping):
            renamed = {modules.renamed_entry(key): entry for key, entry in value.items()}
            changes |= {field.name: renamed} if renamed.keys() != value.keys() else {}
        elif field.name.endswith("_modules"):
            changes |= _by_list(field.name, value, old)
    return changes


def _by_pattern(option: str, table: Mapping[str, Any], old: Mapping[str, str]) -> dict[str, Any]:
    """A table from patterns to values: as it is if it says the same of the new names, else by full name."""
    there, here = first_keys(table, list(old.values()), option), first_keys(table, list(old), option)
    before = {new: table[there[name]] for new, name in old.items() if name in there}
    if before == {name: table[key] for name, key in here.items()}:
        return {}
    # A name also matches those that end with it, and the first key that matches decides.
    return {option: {name: before[name] for name in sorted(before, key=lambda name: -name.count("."))}}


def _by_list(option: str, patterns: Sequence[str] | str, old: Mapping[str, str]) -> dict[str, Any]:
    """Patterns for some of the targets: as they are if they match the same new names, else full names."""
    there = set(selected(patterns, list(old.values()), option))
    wanted = [new for new, name in old.items() if name in there]
    return {} if set(wanted) == set(selected(patterns, list(old), option)) else {option: wanted}
