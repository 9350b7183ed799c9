"""Which stored tensors a model's parameters are made of, as transformers' own tables say, and the way back.

Most are one to one, under another name at most. Some parameters are made of several tensors: a checkpoint of Mixtral stores
each expert by itself, and transformers 5 has one parameter for all of them. What is stored together is merged together.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import MergeError, shown, told_error
from minipeft.merging.from_disk.stored import StoredTensor


@dataclass(frozen=True)
class Group(ABC):
    """Stored tensors that are read and written together."""

    stored: tuple[StoredTensor, ...]  # the tensors
    made: Mapping[str, Tensor]  # the parameters that they make, by name: shapes and dtypes without values

    @abstractmethod
    def read(self) -> dict[str, Tensor]:
        """The parameters, by name."""

    @abstractmethod
    def written(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to store for these values of all its parameters, by key.

        Raises:
            MergeError: transformers does not know the way back.
        """


@dataclass(frozen=True)
class Renamed(Group):
    """One tensor that is one parameter. A table may have more rows than are stored: those come from the adapter."""

    def read(self) -> dict[str, Tensor]:
        (name, made), value = next(iter(self.made.items())), self.stored[0].read()
        if value.shape != made.shape:
            value = torch.cat([value, value.new_zeros(len(made) - len(value), *value.shape[1:])])
        return {name: value}

    def written(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (name,) = self.made
        return {self.stored[0].key: values[name]}


@dataclass(frozen=True)
class Converted(Group):
    """Tensors that one of transformers' converters makes into parameters: stacked, joined, split or turned."""

    first: str  # the name that transformers gives the whole
    patterns: tuple[str, ...]  # which of the converter's patterns each stored tensor matches
    converter: Any  # of transformers
    model: Any  # has the conversions that were used, for the way back

    def read(self) -> dict[str, Tensor]:
        return self.convert([tensor.read() for tensor in self.stored])

    def convert(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """The parameters made of these tensors, which take the place of the stored ones; on any device."""
        converter = copy.deepcopy(self.converter)
        for stored, pattern, tensor in zip(self.stored, self.patterns, tensors, strict=True):
            converter.add_tensor(self.first, stored.key, pattern, tensor)
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def written(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        try:
            made = revert_weight_conversion(self.model, dict(values))
        except Exception as error:  # whatever a converter raises
            raise self._no_way_back(told_error(error)) from error
        there = {tensor.key: tensor.shape for tensor in self.stored}
        if {key: tuple(value.shape) for key, value in made.items()} != there:
            raise self._no_way_back(f"it gives {shown(made, 2)} of other shapes or names")
        return made

    def _no_way_back(self, reason: str) -> MergeError:
        return MergeError(
            f"{self.first} is made of {shown([tensor.key for tensor in self.stored], 2)}, and transformers cannot write it "
            f"back in that form ({reason}). Load the model, merge_and_unload() and save_pretrained()."
        )


def empty_like(stored: StoredTensor) -> Tensor:
    """A tensor of this shape and dtype without values."""
    return torch.empty(stored.shape, dtype=stored.torch_dtype, device="meta")


def find_groups(model: nn.Module, known: Mapping[str, Tensor], tensors: Iterable[StoredTensor]) -> dict[str, Group]:
    """Name of a parameter or persistent buffer -> the group that makes it; other stored tensors are in no group.

    The model notes which of its conversions were used, as after loading.

    Raises:
        MergeError: two stored tensors are meant for one parameter, or a conversion fails.
    """
    renaming = _Renaming(model, known)
    members: dict[str, list[tuple[StoredTensor, str | None]]] = {}
    for tensor in sorted(tensors, key=lambda tensor: _natural(tensor.key)):
        name, pattern = renaming(tensor.key)
        if name in known:
            members.setdefault(name, []).append((tensor, pattern))
    renaming.remember_used()
    groups: dict[str, Group] = {}
    for first, found in members.items():
        group = _group(model, first, found, renaming)
        for name in group.made:
            if name in groups:
                keys = [tensor.key for one in (groups[name], group) for tensor in one.stored]
                raise MergeError(f"{name}: the base has more than one value for it, {shown(keys, 3)}.")
            groups[name] = group
    return groups


def _group(model: nn.Module, first: str, found: list[tuple[StoredTensor, str | None]], renaming: _Renaming) -> Group:
    stored, patterns = tuple(tensor for tensor, _ in found), [pattern for _, pattern in found]
    converted = [pattern for pattern in patterns if pattern is not None]
    if not converted and len(stored) == 1:
        return Renamed(stored, {first: empty_like(stored[0])})
    if len(converted) < len(stored):
        keys = [tensor.key for tensor in stored]
        raise MergeError(f"{first}: the base has more than one value for it, {shown(keys, 3)}.")
    group = Converted(stored, {}, first, tuple(converted), renaming.converter(converted[0]), model)
    try:
        return replace(group, made=group.convert(map(empty_like, stored)))
    except Exception as error:  # whatever a converter raises
        raise MergeError(
            f"{first}: transformers cannot make it of the base's tensors ({told_error(error)})."
        ) from error


class _Renaming:
    """What a stored tensor is called in the model, by transformers' tables."""

    def __init__(self, model: Any, known: Mapping[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        self.model, self.known, self.rename = model, dict(known), rename_source_key
        self.prefix: str = getattr(model, "base_model_prefix", "") or ""
        self.conversions: list[Any] = get_model_conversion_mapping(model)
        self.converters = [each for each in self.conversions if isinstance(each, WeightConverter)]
        self.renamings: list[Any] = [each for each in self.conversions if not isinstance(each, WeightConverter)]

    def __call__(self, key: str) -> tuple[str, str | None]:
        """The name of the parameter, and the pattern of the converter that the tensor needs, if it does."""
        name, pattern = self.rename(key, self.renamings, self.converters, self.prefix, self.known)
        if name not in self.known and key in self.known:
            name, pattern = self.rename(key, [], [], self.prefix, self.known)
        return name, pattern

    def converter(self, pattern: str) -> Any:
        """The converter with this pattern."""
        return next(each for each in reversed(self.converters) if pattern in each.source_patterns)

    def remember_used(self) -> None:
        """Leave the conversions that a stored name matched on the model, as loading does: the way back needs them."""
        self.model._weight_conversions = [each for each in self.conversions if each.was_used()]


def _natural(key: str) -> list[tuple[int, int, str, int]]:
    """Sorts expert 10 after expert 9: transformers stacks them in this order."""
    return [_sortable(part) for part in key.split(".")]


def _sortable(part: str) -> tuple[int, int, str, int]:
    if part.isdecimal():
        return 0, int(part), "", -1
    text = part.rstrip("0123456789")
    return 1, 0, text, int(part[len(text) :] or -1)
