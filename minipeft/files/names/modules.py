"""The modules of a model under the names that they have in a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from minipeft.config.patterns import endings
from minipeft.files.names.places import Place, Places
from minipeft.injection.module_tree import Candidate


class ModuleNames:
    """Which names the modules of a model, its candidates in `found`, have in a file.

    `new` says the name in the model for one in the file, `old` the reverse, `adapted` which have an adapter in the file (names
    in the model), and `as_in_file` has the candidates by their names in the file, where these are known.
    """

    def __init__(
        self, model: nn.Module, found: Mapping[str, Candidate], new: Mapping[str, str], adapted: Collection[str]
    ) -> None:
        self.model, self.found, self.new, self.adapted = model, dict(found), dict(new), set(adapted)
        self.old = {name: old for old, name in self.new.items()}
        self.as_in_file: dict[str, Candidate] = {
            self.old[name]: candidate._replace(names=(self.old[name],), wrapped_names=())
            for name, candidate in self.found.items()
            if name in self.old
        }

    def turned(self) -> ModuleNames:
        """The same the other way round: a model that has the names of the file, and a file that has the model's."""
        return ModuleNames(self.model, self.as_in_file, self.old, {self.old[name] for name in self.adapted})

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


def names_in_file(places: Places, moved: Iterable[tuple[str, Place]]) -> ModuleNames:
    """The names that modules have in a file, as far as its tensors say.

    `moved`: (name in the file, place in the model) of each tensor.
    """
    first = {name: one for one, candidate in places.found.items() for name in candidate.known_as}
    pairs: dict[str, str] = {}
    adapted: set[str] = set()
    for name, place in moved:
        module = first[place.module]
        if name.endswith(f".{place.tail}"):
            pairs.setdefault(module, name.removesuffix(f".{place.tail}"))
            if places.is_adapters(place):
                adapted.add(module)
    new: dict[str, str] = {}
    for module, old in _old_names(list(places.found), pairs).items():
        new.setdefault(old, module)
    return ModuleNames(places.model, places.found, new, adapted)


def _old_names(names: Sequence[str], pairs: Mapping[str, str]) -> dict[str, str]:
    """The names in the file: of the modules that are in it, and of those that stand in the model as these do."""
    exchanged = {here: there for new, old in pairs.items() if new != old for here, there in [_prefix_pair(new, old)]}
    same = {start for new, old in pairs.items() if new == old for start in _starts(new)}
    found = {name: pairs.get(name) or (name if name in same else _exchanged(name, exchanged)) for name in names}
    return {name: old for name, old in found.items() if old}


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
