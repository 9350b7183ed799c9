"""A configuration whose patterns name a model's modules, as its old ones named those of the model it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.patterns import first_keys, full_matches, matching
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
    parameters = _parameters(config, modules, modules.as_in_file)
    owners = {name.rpartition(".")[0] for name in parameters}
    targets = (_targets(config, modules, modules.as_in_file) | modules.adapted) - owners
    saved = _saved(config, modules, modules.as_in_file)
    config = replace(config, **_tables(config, modules, [*sorted(targets), *sorted(parameters)]))
    if saved != _saved(config, modules, modules.found):
        config = replace(config, modules_to_save=[name for name in modules.found if name in saved] or None)
    if parameters != _parameters(config, modules, modules.found):
        option: dict[str, Any] = {"target_parameters": sorted(parameters) or None}
        config = replace(config, **option)
    if targets and targets != _targets(config, modules, modules.found):
        listed = [name for name in modules.found if name in targets]
        unset: dict[str, Any] = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        config = replace(config, target_modules=listed, **unset)
    return config


def _targets(config: AdapterConfig, modules: ModuleNames, found: dict[str, Candidate]) -> set[str]:
    try:
        selected = Selection(modules.model, config, found).targets
    except TargetError:  # nothing is selected
        return set()
    return {_here(name, modules, found) for name in selected}


def _saved(config: AdapterConfig, modules: ModuleNames, found: dict[str, Candidate]) -> set[str]:
    if config.modules_to_save is None:
        return set()
    return {_here(name, modules, found) for name in Selection(modules.model, config, found).saved}


def _parameters(config: AdapterConfig, modules: ModuleNames, found: dict[str, Candidate]) -> set[str]:
    chosen = Selection(modules.model, config, found).parameters
    return {f"{_here(name, modules, found)}.{parameter}" for name, owned in chosen.items() for parameter in owned}


def _here(name: str, modules: ModuleNames, found: dict[str, Candidate]) -> str:
    return modules.new[name] if found is modules.as_in_file else name


def _tables(config: AdapterConfig, modules: ModuleNames, names: Sequence[str]) -> dict[str, Any]:
    """The options that say something of single modules, with `names` the targets in the model."""
    old = {name: _in_file(name, modules) for name in names}
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


def _in_file(name: str, modules: ModuleNames) -> str:
    """The name in the file of a module or of its bare parameter."""
    owner, _, last = name.rpartition(".")
    return modules.old.get(name) or (f"{modules.old[owner]}.{last}" if owner in modules.old else name)


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

    def chosen(names: Sequence[str]) -> set[str]:
        return set(full_matches(patterns, names, option) if isinstance(patterns, str) else matching(patterns, names))

    there, here = chosen(list(old.values())), chosen(list(old))
    wanted = [new for new, name in old.items() if name in there]
    return {} if set(wanted) == here else {option: wanted}
