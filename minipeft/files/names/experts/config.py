"""The configuration of a file with a LoRA for each expert, for a model that has the experts in one parameter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from minipeft.config.adapter_config import ALL_LINEAR, ALL_LINEAR_TEXT, AdapterConfig
from minipeft.config.patterns import by_shorter_key, endings, first_keys, full_matches, matching
from minipeft.files.names.experts.pair import FusedPair
from minipeft.injection.module_tree import Candidate
from minipeft.layers.base import layer_ops

PATTERN_TABLES = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def with_parameters(
    config: AdapterConfig, modules: Mapping[str, Candidate], old: Collection[str], pairs: Mapping[str, FusedPair]
) -> AdapterConfig:
    """The configuration with parameters in ``target_parameters``, and without what only the old names matched.

    Args:
        config: the file's.
        modules: the model's `candidates`.
        old: names of the layers that it no longer has.
        pairs: by parameter that they became a part of.
    """
    given: Any = config
    short = _short_names(pairs, modules)
    values: dict[str, Any] = {
        "target_modules": _targets(config.target_modules, modules, old, {name.rpartition(".")[0] for name in pairs}),
        "target_parameters": list(
            dict.fromkeys([*_kept(given.target_parameters or (), modules, old), *short.values()])
        ),
        "lora_dropout": 0.0,
    }
    for option, table in PATTERN_TABLES.items():
        before, wanted = getattr(given, table), {name: getattr(pair, option) for name, pair in pairs.items()}
        if before or set(wanted.values()) != {getattr(given, option)}:
            used = set(first_keys(before, [*_layers(modules), *pairs], table).values())
            # The first key that fits decides, so the new ones come first.
            values[table] = by_shorter_key(wanted, short) | {key: value for key, value in before.items() if key in used}
    return replace(config, **values)


def _kept(targets: Collection[str], modules: Mapping[str, Candidate], old: Iterable[str]) -> list[str]:
    """``target_parameters`` without those that only matched the weight of what is no longer a layer."""
    gone = _used(targets, (f"{name}.weight" for name in old)) - _used(targets, _parameters(modules))
    return [target for target in targets if target not in gone]


def _parameters(modules: Mapping[str, Candidate]) -> list[str]:
    return [f"{first}.{own}" for first, candidate in modules.items() for own in candidate.base._parameters]


def _short_names(names: Collection[str], modules: Mapping[str, Candidate]) -> dict[str, str]:
    """For each parameter the last two parts of its name, if all that end so are among these, else all of it."""
    others = {_ending(name) for name in _parameters(modules) if name not in names}
    return {name: name if _ending(name) in others else _ending(name) for name in names}


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _layers(modules: Mapping[str, Candidate]) -> list[str]:
    return [name for c in modules.values() if layer_ops(c.base) is not None for name in c.known_as]


def _targets(given: Any, modules: Mapping[str, Candidate], old: Iterable[str], owners: set[str]) -> Any:
    """``target_modules`` without what matches nothing any more, or a module whose parameter is adapted instead."""
    if given in (None, ALL_LINEAR, ALL_LINEAR_TEXT):
        return given
    layers = _layers(modules)
    if isinstance(given, str):
        names = full_matches(given, [*layers, *owners], "target_modules")
        return given if names and not owners.intersection(names) else [name for name in names if name not in owners]
    kept: list[str] = []
    gone, here, of_owners = _used(given, old), _used(given, layers), _used(given, owners)
    for entry in given:
        if entry in of_owners:
            kept += matching([entry], layers)
        elif entry in here or entry not in gone:
            kept.append(entry)
    return kept


def _used(entries: Iterable[str], names: Iterable[str]) -> set[str]:
    """The entries that equal one of these names, or end it."""
    wanted = set(entries)
    return {ending for name in names for ending in endings(name) if ending in wanted}
