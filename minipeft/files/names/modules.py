"""The modules of a model under the names that they have in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from minipeft.config import AdapterConfig
from minipeft.files.names.places import Place, Places
from minipeft.injection.module_tree import Candidate
from minipeft.patterns import endings


class ModuleNames:
    """Which names the modules of a model have in a file, as far as its tensors say.

    Args:
        places: of the model.
        moved: (name in the file, place in the model) of each tensor, without prefix.
        config: of the file.

    Attributes:
        found: the model's candidates.
        as_in_file: those whose name in the file is known, by that name.
        new: name in the file -> name in the model. `old` is the other way round.
        adapted: names in the model of the modules that have an adapter in the file.
    """

    def __init__(self, places: Places, moved: Iterable[tuple[str, Place]], config: AdapterConfig) -> None:
        self.model: nn.Module = places.model
        self.found = places.found
        first = {name: one for one, candidate in self.found.items() for name in candidate.known_as}
        companions = tuple(prefix for prefix, _ in config.companions())
        pairs: dict[str, str] = {}
        self.adapted: set[str] = set()
        for name, place in moved:
            module = first[place.module]
            if name.endswith(f".{place.tail}"):
                pairs.setdefault(module, name.removesuffix(f".{place.tail}"))
                if places.is_adapters(place) and not place.tail.startswith(companions or ("\0",)):
                    self.adapted.add(module)
        self.new: dict[str, str] = {}
        for module, old in _old_names(list(self.found), pairs).items():
            self.new.setdefault(old, module)
        self.old = {new: old for old, new in self.new.items()}
        self.as_in_file: dict[str, Candidate] = {
            self.old[name]: dataclasses.replace(candidate, names=(self.old[name],), wrapped_names=())
            for name, candidate in self.found.items()
            if name in self.old
        }

    def renamed(self, name: str) -> str:
        """A name of the file that starts with a module's, such as that of a weight, in the model's names."""
        for start in _starts(name):
            if start in self.new:
                return self.new[start] + name[len(start) :]
        return name

    def renamed_entry(self, entry: str) -> str:
        """A module of a table by full name or suffix, in the model's names."""
        new = self.renamed(entry)
        if new != entry:
            return new
        fits = [new for old, new in self.new.items() if entry in endings(old)]
        return fits[0] if len(fits) == 1 and entry not in endings(fits[0]) else entry


def _old_names(names: Sequence[str], pairs: Mapping[str, str]) -> dict[str, str]:
    """The names in the file: of the modules that are in it, and of those that stand in the model as these do."""
    exchanged = {here: there for new, old in pairs.items() if new != old for here, there in [_prefix_pair(new, old)]}
    same = {start for new, old in pairs.items() if new == old for start in _starts(new)}
    found = {}
    for name in names:
        if name in pairs:
            found[name] = pairs[name]
            continue
        if name in same:
            found[name] = name
            continue
        old = _exchanged(name, exchanged)
        if old:
            found[name] = old
    return found


def _prefix_pair(new: str, old: str) -> tuple[str, str]:
    """(prefix in the model, prefix in the file), with ``#`` for numbers, without what both names end with."""
    here, there = _template(new), _template(old)
    while here and there and here[-1] == there[-1]:
        here.pop()
        there.pop()
    return ".".join(here), ".".join(there)


def _exchanged(name: str, prefixes: Mapping[str, str]) -> str | None:
    """A name of the model with the longest of these prefixes exchanged; None if it has none of them."""
    template = _template(name)
    for start in [*_starts(".".join(template)), ""]:
        if start not in prefixes:
            continue
        count = start.count(".") + 1 if start else 0
        numbers = iter(part for part in name.split(".")[:count] if part.isdecimal())
        there = prefixes[start].split(".") if prefixes[start] else []
        if there.count("#") != template[:count].count("#"):
            return None
        parts = [next(numbers) if part == "#" else part for part in there]
        return ".".join([*parts, *name.split(".")[count:]])
    return None


def _template(name: str) -> list[str]:
    return ["#" if part.isdecimal() else part for part in name.split(".")]


def _starts(name: str) -> Iterator[str]:
    """The name and every shorter one that ends before one of its dots, the longest first."""
    while name:
        yield name
        name = name.rpartition(".")[0]
