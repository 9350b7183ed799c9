"""What a file of another tool becomes: a configuration in PEFT's format, and tensors under PEFT's keys.

A format is a file of this folder with a `Format`: it knows its files by their keys, and says for each module which
tensors it has. Nothing is computed before the tensors are read (see `Entry`). That every stored tensor has found a place,
and every module has what it needs, is checked here for all formats.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.config.options import plain
from minipeft.config.patterns import endings
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import CheckpointError, shown, told
from minipeft.files.tensor_file import Entry, TensorFile

NEEDED = {"LORA": ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"})}


@dataclass(frozen=True)
class Source:
    """A file of another tool, whose header has been read, and what is known about its surroundings."""

    file: TensorFile  # the weights
    directory: Path  # what else the tool wrote
    config: Mapping[str, Any]  # ``adapter_config.json`` there; empty if there is none
    # The names of the modules of a component of the model, such as "unet"; None: not known
    modules: Callable[[str], Collection[str] | None]


@dataclass(frozen=True)
class Module:
    """What a file holds for one module: each tensor by the end of PEFT's key."""

    tensors: Mapping[str, Entry]
    r: int
    alpha: float


@dataclass(frozen=True)
class Part:
    """An adapter for one component of a model, in PEFT's format."""

    values: Mapping[str, Any]  # of adapter_config.json
    entries: Mapping[str, Entry]  # by PEFT's keys


@dataclass(frozen=True)
class Format:
    """How files of one tool are known and read."""

    name: str  # whose it is, for messages: ``mlx-lm``
    knows: Callable[[TensorFile], bool]  # whether a file with these keys and this metadata can only be of this format
    # A component's name and keys -> its adapter. Raises CheckpointError.
    read: Callable[[Source, str, Sequence[str]], Part]
    component_of: Callable[[str], str] = lambda key: ""  # a key -> the component that it is for

    def components(self, file: TensorFile) -> dict[str, list[str]]:
        """The keys of a file by the component that they are for."""
        found: dict[str, list[str]] = {}
        for key in file.entries:
            found.setdefault(self.component_of(key), []).append(key)
        return found


def part(
    source: Source,
    keys: Iterable[str],
    modules: Mapping[str, Module],
    *,
    peft_type: str = "LORA",
    rank: int | None = None,
    spent: Collection[str] = (),
    known: Collection[str] | None = None,
    **values: Any,
) -> Part:
    """The adapter that these modules make up.

    Args:
        source: where they come from.
        keys: the stored keys that must all have found their place.
        modules: by their names in the model.
        peft_type: the method.
        rank: that the tool's configuration says of all modules, if it does.
        spent: keys that were read for the configuration.
        known: the names of the modules that the model has, if they are known.
        values: more of the configuration.

    Raises:
        CheckpointError: a stored tensor has no place, or a module lacks one or is of another rank.
    """
    entries = {f"{PREFIX}{name}.{end}": entry for name, own in modules.items() for end, entry in own.tensors.items()}
    file, used = source.file, {key for entry in entries.values() for key in entry.sources}
    left = [key for key in keys if key not in used and key not in spent]
    if left or not modules:
        raise CheckpointError(f"{file.path}: there is no place in an adapter for {shown(left, 3)}.")
    for name, module in modules.items():
        _check_module(file, name, module, peft_type, rank)
    config = {"peft_type": peft_type, **_ranks(modules, "alpha" if peft_type != "LORA" else "lora_alpha")}
    for option, end in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        if any(end in module.tensors for module in modules.values()):
            config[option] = True
    return Part({**config, **_targets(modules, known), **values}, entries)


def _check_module(file: TensorFile, name: str, module: Module, peft_type: str, rank: int | None) -> None:
    if peft_type in NEEDED and not any(pair <= module.tensors.keys() for pair in NEEDED[peft_type]):
        raise CheckpointError(f"{file.path}: {name} has {shown(sorted(module.tensors))} alone, not a pair.")
    if rank not in (None, module.r):
        raise CheckpointError(f"{file.path}: {name} is of rank {module.r}, and the configuration says {rank}.")


def _ranks(modules: Mapping[str, Module], alpha: str) -> dict[str, Any]:
    """Rank and alpha: the most common ones, and tables of those that differ."""
    ranks, alphas = ({name: getattr(module, what) for name, module in modules.items()} for what in ("r", "alpha"))
    r, most = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        alpha: plain(most),
        "rank_pattern": {_exactly(name): value for name, value in ranks.items() if value != r},
        "alpha_pattern": {_exactly(name): plain(value) for name, value in alphas.items() if value != most},
    }


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _targets(modules: Mapping[str, Module], known: Collection[str] | None) -> dict[str, Any]:
    """The names as targets. A reader takes them as endings, so what else ends in one is excluded."""
    others = [n for n in known or () if n not in modules and any(ending in modules for ending in endings(n))]
    return {"target_modules": list(modules), **({"exclude_modules": others} if others else {})}


def numbers(file: TensorFile, keys: Sequence[str]) -> dict[str, float]:
    """The values of tensors of one element, such as `alpha`: they are numbers of the configuration.

    Raises:
        CheckpointError: one has more elements or none.
    """
    for key in keys:
        if math.prod(file.shapes[key]) != 1:
            raise CheckpointError(f"{file.path}: {told(key, 200)} is not one number.")
    return {key: float(value) for key, value in file.read(keys).items()}


def rank_of(source: Source, down: str, up: str, *, down_axis: int = 0, up_axis: int = 1) -> int:
    """The rank of a pair of factors, from their shapes.

    Raises:
        CheckpointError: one is missing or is no matrix, or the two disagree.
    """
    shapes = [source.file.shapes.get(key, ()) for key in (down, up)]
    axes = (down_axis, up_axis)
    if any(len(shape) < 2 for shape in shapes):
        raise CheckpointError(f"{source.file.path}: {down} and {up} are not a pair of matrices.")
    ranks = [shape[axis] for shape, axis in zip(shapes, axes, strict=True)]
    if ranks[0] != ranks[1] or ranks[0] < 1:
        raise CheckpointError(f"{source.file.path}: {down} is of rank {ranks[0]}, and {up} of rank {ranks[1]}.")
    return ranks[0]
