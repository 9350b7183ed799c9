"""The option ``layers_to_transform``: of the modules that are selected, those in layers of some indices."""

from __future__ import annotations

from collections.abc import Mapping

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.patterns import endings
from minipeft.errors import TargetError, shown


def in_layers(config: AdapterConfig, chosen: list[str], every_pattern: bool) -> list[str]:
    """Keep the modules with one of the wanted layer indices; a module without an index is in no layer."""
    if config.layers_to_transform is None:
        return chosen
    wanted = set(config.layers_to_transform)  # type: ignore[arg-type]
    patterns = {pattern: place for place, pattern in enumerate(config.layers_pattern or ())}
    indices = {name: _layer_index(name, patterns) for name in chosen}
    kept = [name for name in chosen if indices[name] in wanted]
    if every_pattern:
        seen = {index for index in indices.values() if index is not None}
        if missing := sorted(wanted - seen):
            have = f"0 to {max(seen)}" if seen else "none; check layers_pattern"
            raise TargetError(
                f"layers_to_transform: no targeted module in layer {shown(missing)} (layers found: {have})."
            )
        before, after = ({ending for name in names for ending in endings(name)} for names in (chosen, kept))
        for entry in config.target_modules or ():
            if entry in before and entry not in after:
                raise TargetError(f"target_modules: {entry!r} is in none of the layers {shown(sorted(wanted))}.")
    return kept


def _layer_index(name: str, patterns: Mapping[str, int]) -> int | None:
    """The first number in a name; if there are patterns, the first one behind the earliest pattern that has one."""
    parts = name.split(".")
    numbers = [(".".join(parts[:place]), int(part)) for place, part in enumerate(parts) if part.isdecimal()]
    if not patterns:
        return numbers[0][1] if numbers else None
    behind = [
        (patterns[ending], number) for before, number in numbers for ending in endings(before) if ending in patterns
    ]
    return min(behind, key=lambda pair: pair[0])[1] if behind else None
