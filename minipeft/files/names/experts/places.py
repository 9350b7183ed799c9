"""Where a layer of older transformers stands in today's model: which part of which parameter it is.

Which layers became which parameter is read from transformers' own tables, with which it converts the checkpoints of models, so
a new model needs nothing here. Nothing is guessed: names that the tables do not lead to a bare parameter have no place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from minipeft.errors import CheckpointError, shown, told
from minipeft.files.names.conversions import conversions
from minipeft.injection.module_tree import Candidate
from minipeft.injection.sites import reader_of
from minipeft.layers.base import layer_ops

MAX_NAME = 500  # characters; the tables' expressions are made for the names of models
# Of a name: what stands before its last number, the number, and what stands behind it.
_NUMBERED = re.compile(r"(.*\.)(0|[1-9]\d{0,5})((?:\.[^.\d][^.]*)*)")
_NUMBERS = re.compile(r"\.\d+(?=\.|$)")
# Unsloth's GPT-OSS in 4 bits has a list of layers in the place of each parameter.
_LISTS = re.compile(r"(.*\.experts\.)(gate_up|down)_projs\.\d+")

_GATED = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)")
# A layer of an expert -> the parameter that it is a part of, which part, and of how many.
_JOINED = {"gate_proj": ("gate_up_proj", 0, 2), "up_proj": ("gate_up_proj", 1, 2), "down_proj": ("down_proj", 0, 1)}


@dataclass(frozen=True)
class ExpertPlace:
    """A bare parameter of the model, or the part of it that was a layer of its own.

    The layer ``experts.3.up_proj`` is `part` 1 of 2 `parts` of ``experts.gate_up_proj``, of `expert` 3.
    """

    module: str  # that has the parameter
    parameter: str
    part: int = 0  # which of the equal slices of its output features
    parts: int = 1  # how many layers were joined, such as 2 for gate and up
    alternates: bool = False  # whether the joined layers take turns feature by feature, as in GPT-OSS
    expert: int | None = None  # index along the first dimension; None: the layer had the whole parameter, as today
    around: tuple[str, str] = ("", "")  # what stood around the index in the old name; without one, the name and nothing

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}"

    def rows(self, features: int) -> slice:
        """Which output features of one expert are the layer's, out of this many."""
        size = features // self.parts
        return (
            slice(self.part, None, self.parts) if self.alternates else slice(self.part * size, (self.part + 1) * size)
        )


class ExpertPlaces:
    """The places of a file's layers in one model, whose `candidates` are `modules`."""

    def __init__(self, model: nn.Module, modules: Mapping[str, Candidate]) -> None:
        self._modules = modules
        self._names = {name for candidate in modules.values() for name in candidate.known_as}
        self._parameters = dict(_bare_parameters(modules))
        self._by_tail: dict[str, list[str]] = {}
        for name in self._parameters:
            self._by_tail.setdefault(_tail(name), []).append(name)
        self._renamings, self._converters = conversions(model) if self._parameters else ([], [])
        self._scopes = {t.scope_prefix for t in self._converters if t.scope_prefix}
        self._of_first: dict[tuple[str, str], ExpertPlace | None] = {}  # what stands around the index -> expert 0's
        self._unknown: set[str] = set()  # names with 0 for their numbers

    def of(self, name: str) -> ExpertPlace | None:
        """The place of a layer of the file that is not a layer of the model; None if it is one there too, or has no place.

        Raises:
            CheckpointError: there are two places for it.
        """
        return self.of_expert(name) or self._of_whole(name)

    def of_expert(self, name: str) -> ExpertPlace | None:
        """The place of a layer of one expert."""
        match = _NUMBERED.fullmatch(name) if len(name) <= MAX_NAME else None
        if match is None or name in self._names:
            return None
        before, number, behind = match.groups()
        if (before, behind) not in self._of_first:  # looked up once for all experts
            self._of_first[before, behind] = self._find_expert(f"{before}0{behind}")
        place = self._of_first[before, behind]
        return None if place is None else replace(place, expert=int(number), around=(before, behind))

    def _find_expert(self, name: str) -> ExpertPlace | None:
        if (lists := _LISTS.fullmatch(name)) is not None:
            return self._parameter(f"{lists[1]}{lists[2]}_proj")
        return self._only(name, self._converted) or self._as_the_module_says(name)

    def _of_whole(self, name: str) -> ExpertPlace | None:
        """The place of a layer that had a whole parameter, such as a router or all experts of ParallelExperts."""
        if name in self._names or len(name) > MAX_NAME:  # a router was a layer, and may have kept its name
            place = self._parameters.get(f"{name}.weight")
        elif (of_all_layers := _NUMBERS.sub(".0", name)) in self._unknown:
            return None
        elif (place := self._only(name, self._moved)) is None:
            self._unknown.add(of_all_layers)
        return None if place is None else replace(place, around=(name, ""))

    def _as_the_module_says(self, name: str) -> ExpertPlace | None:
        """The place of gate, up or down of experts that never were layers in transformers, if their module says its layout.

        Other programs have them as layers, such as mlx-lm. See ``use_experts_implementation`` of transformers.
        """
        match = _GATED.fullmatch(name)
        if match is None:
            return None
        joined, part, parts = _JOINED[match[2]]
        place = self._parameter(f"{match[1]}.{joined}")
        base = None if place is None else self._modules[place.module].base
        if place is None or not getattr(base, "has_gate", False):
            return None
        return replace(place, part=part, parts=parts, alternates=not getattr(base, "is_concatenated", True))

    def _only(self, name: str, read: Callable[[str], ExpertPlace | None]) -> ExpertPlace | None:
        """The place of a name by the model's tables; if it has none, by the tables of a part of the model, if only one has it."""
        found = [read(name)]
        if found == [None]:
            found = list({read(f"{scope}.{_tail(name)}") for scope in self._scopes} - {None})
        if len(found) > 1:
            raise _ambiguous(name, [place.name for place in found if place is not None])
        return found[0] if found else None

    def _converted(self, name: str) -> ExpertPlace | None:
        """The place of a layer that a converter of the tables stacks into a parameter."""
        renamed, pattern = self._renamed(name)
        converter = next((c for c in self._converters if pattern in c.source_patterns), None)
        place = None if converter is None else self._parameter(renamed)
        if converter is None or place is None or not self._only_stacks(converter, place):
            return None
        sources = converter.source_patterns
        return replace(place, part=sources.index(pattern), parts=len(sources))

    def _only_stacks(self, converter: Any, place: ExpertPlace) -> bool:
        """Whether a converter only stacks the experts, and puts the output features of several layers in a row."""
        base = self._modules[place.module].base
        if base._parameters[place.parameter].ndim != 3 or getattr(base, "is_transposed", False):  # type: ignore[union-attr]
            return False
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
        joined = [("MergeModulelist", 0)] + [("Concatenate", 1)] * (len(converter.source_patterns) > 1)
        return steps == joined and len(converter.target_patterns) == 1

    def _moved(self, name: str) -> ExpertPlace | None:
        """The place of a layer that the tables only rename."""
        renamed, pattern = self._renamed(name)
        return self._parameter(renamed) if pattern is None else None

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """(today's name of its weight, the pattern of the converter that led there), by the tables."""
        if not self._renamings and not self._converters:
            return f"{name}.weight", None
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(f"{name}.weight", self._renamings, self._converters)

    def _parameter(self, name: str) -> ExpertPlace | None:
        """The bare parameter of this name, or of the only name that ends like it from the list of layers on."""
        if name in self._parameters:
            return self._parameters[name]
        names = self._by_tail.get(_tail(name), [])
        if len(names) > 1:
            raise _ambiguous(name, names)
        return self._parameters[names[0]] if names else None


def _ambiguous(name: str, names: list[str]) -> CheckpointError:
    return CheckpointError(f"{told(name, 200)} of the file can be {shown(sorted(names))} of this model.")


def _tail(name: str) -> str:
    """A name from its first list on: 'layers.0.mlp.gate' of 'model.language_model.layers.0.mlp.gate'."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), 1)
    return ".".join(parts[max(first - 1, 0) :])


def _bare_parameters(modules: Mapping[str, Candidate]) -> Iterator[tuple[str, ExpertPlace]]:
    """Every parameter of 2 or 3 dimensions that can be adapted as one, under each of its names.

    The module that has it is not itself a layer, and is called.
    """
    for first, candidate in modules.items():
        bare = [name for name, p in candidate.base._parameters.items() if p is not None and p.ndim in (2, 3)]
        if bare and layer_ops(candidate.base) is None and reader_of(candidate) is None:
            for known in candidate.known_as:
                yield from ((f"{known}.{parameter}", ExpertPlace(first, parameter)) for parameter in bare)
