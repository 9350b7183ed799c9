"""The modules of a model under the names that they have in a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from minipeft.config.patterns import endings
from minipeft.files.names.places import Place, Places
from minipeft.injection.module_tree import Candidate


class ModuleNames:
    """Which names the modules of a model have in a file.

    Args:
        model: the model.
        here: its `candidates`.
        to_model: name in the file -> name in the model, of the modules of which both are known.
        adapted: the modules that have an adapter in the file, by their names in the model.
    """

    def __init__(
        self, model: nn.Module, here: Mapping[str, Candidate], to_model: Mapping[str, str], adapted: Collection[str]
    ) -> None:
        self.model, self.here, self.to_model, self.adapted = model, dict(here), dict(to_model), set(adapted)
        self.to_file = {name: old for old, name in self.to_model.items()}
        # The candidates by their names in the file, where these are known.
        self.in_file: dict[str, Candidate] = {
            self.to_file[name]: candidate._replace(names=(self.to_file[name],), wrapped_names=())
            for name, candidate in self.here.items()
            if name in self.to_file
        }

    def swapped(self) -> ModuleNames:
        """The same the other way round: a model that has the names of the file, and a file that has the model's."""
        return ModuleNames(self.model, self.in_file, self.to_file, {self.to_file[name] for name in self.adapted})

    def renamed(self, name: str) -> str:
        """A name of the file that starts with a module's, such as that of a weight, in the model's names."""
        for start in _starts(name):
            if start in self.to_model:
                return self.to_model[start] + name[len(start) :]
        return name

    def renamed_entry(self, entry: str) -> str:
        """A module of a table by full name or suffix, in the model's names."""
        new = self.renamed(entry)
        if new != entry:
            return new
        fits = [new for old, new in self.to_model.items() if entry in endings(old)]
        return fits[0] if len(fits) == 1 and entry not in endings(fits[0]) else entry

    def name_in_file(self, name: str) -> str:
        """The name in the file of a module or of its bare parameter; its own name if that is not known."""
        owner, _, last = name.rpartition(".")
        return self.to_file.get(name) or (f"{self.to_file[owner]}.{last}" if owner in self.to_file else name)


def names_in_file(places: Places, moved: Iterable[tuple[str, Place]]) -> ModuleNames:
    """The names that modules have in a file, as far as its tensors say.

    `moved`: (name in the file, place in the model) of each tensor.
    """
    first = {name: one for one, candidate in places.here.items() for name in candidate.known_as}
    pairs: dict[str, str] = {}  # name in the model -> in the file
    adapted: set[str] = set()
    for name, place in moved:
        module = first[place.module]
        if name.endswith(f".{place.tail}"):
            pairs.setdefault(module, name.removesuffix(f".{place.tail}"))
            if places.is_adapters(place):
                adapted.add(module)
    to_model: dict[str, str] = {}
    for module, old in _with_modules_alike(list(places.here), pairs).items():
        to_model.setdefault(old, module)
    return ModuleNames(places.model, places.here, to_model, adapted)


def _with_modules_alike(names: Sequence[str], pairs: Mapping[str, str]) -> dict[str, str]:
    """Name in the model -> in the file, of the modules in `pairs` and of those whose names start as theirs do.

    Two names say how a prefix changed: if ``model.layers.0.q`` is ``h.0.q`` in the file, ``model.layers.7.k`` is ``h.7.k``.
    """
    exchanged = dict(_prefix_pair(new, old) for new, old in pairs.items() if new != old)
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
