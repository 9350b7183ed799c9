"""Loading the rows that a vocabulary gained: whole tables in a file, as PEFT writes them, become rows of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.patterns import is_suffix
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import CheckpointError, shown
from minipeft.files.format import FLOATS, AdapterFile
from minipeft.files.resized_vocabulary import OPTION, ROWS, ids_by_name, tables
from minipeft.injection.module_tree import outside_adapters
from minipeft.injection.wrapper import innermost
from minipeft.layers.offloaded import values_of

# In PEFT's files the keys of a base table have these in them, if rows of it train or it has a trained copy.
INFIXES = (".token_adapter.base_layer", ".original_module")
COPY = f"{INFIXES[1]}.weight"


@dataclass(frozen=True)
class NewRows:
    """Rows of a resized vocabulary that a file brings."""

    config: AdapterConfig  # the file's, with the rows in ``trainable_token_indices``
    values: Mapping[str, Tensor] = field(default_factory=dict)  # by the key that they have as rows of tokens
    done: frozenset[str] = frozenset()  # keys of what they come from: whole tables, and rows that train


def find_new_rows(file: AdapterFile, model: nn.Module) -> NewRows:
    """Compare whole tables in a file with the model's; the rows that differ are rows of tokens to load.

    Raises:
        CheckpointError: a table has another number of rows than the model's, or is damaged, or two that are tied differ.
    """
    known = {name: table.weight for name, table in tables(model).items()}
    if not known:
        return NewRows(file.config)
    owners = _keys_of_tables(file, model, known)
    values = file.read(owners)
    found: dict[str, Tensor] = {}
    for key, owner in owners.items():
        if not torch.equal(found.setdefault(owner, values[key]), values[key]):
            raise CheckpointError(f"{file.path}: {key} differs from {owner}, to which it is tied.")
    here = values_of(model, {name: known[name] for name in found})
    ids = {name: _differing_rows(table, here[name]) for name, table in found.items()}
    ids = {name: rows for name, rows in ids.items() if rows and 2 * len(rows) <= len(found[name])}
    fields = {f.name for f in dataclasses.fields(file.config)}
    copied = frozenset(key for key, owner in owners.items() if owner in ids and _trains(file, key))
    ids = {name: rows for name, rows in ids.items() if any(owners[key] == name for key in owners.keys() - copied)}
    if not ids or OPTION not in fields:
        return NewRows(file.config, done=copied)
    if clash := [key for key in copied if owners[key] in ids]:
        raise CheckpointError(
            f"{file.path} trains {clash[0]} in full, and brings other rows {shown(ids[owners[clash[0]]])} for what it is tied "
            "to. Resize the base with the seed of that run, or load the base that it was trained on."
        )
    done = copied | {key for key, owner in owners.items() if owner in ids}
    return _with_rows(file, ids_by_name(model, getattr(file.config, OPTION)), ids, found, done)


def _with_rows(
    file: AdapterFile,
    trained: Mapping[str, list[int]],
    ids: Mapping[str, list[int]],
    found: Mapping[str, Tensor],
    done: frozenset[str],
) -> NewRows:
    """The rows that differ, behind those that train, which the file has already."""
    added = {name: sorted(set(rows) - set(trained.get(name, ()))) for name, rows in ids.items()}
    added = {name: rows for name, rows in added.items() if rows}
    keys = {name: f"{PREFIX}{name}.{ROWS}" for name in added}
    before = {name: key for name, key in keys.items() if name in trained}
    if any(file.shapes.get(key) != (len(trained[name]), found[name].shape[1]) for name, key in before.items()):
        return NewRows(file.config)  # which is refused when the keys are compared
    own = file.read(list(before.values()))
    values = {key: found[name][added[name]] for name, key in keys.items()}
    values |= {key: torch.cat([own[key], values[key].to(own[key])]) for key in before.values()}
    option: dict[str, Any] = {OPTION: {**trained, **{name: [*trained.get(name, ()), *added[name]] for name in added}}}
    config = dataclasses.replace(file.config, **option) if added else file.config
    return NewRows(config, values, done | set(before.values()))


def _trains(file: AdapterFile, key: str) -> bool:
    """Whether a table is a copy of a module that trains in full, whose trained rows the file has too."""
    name = key.removeprefix(PREFIX).removesuffix(COPY).removesuffix(".weight")
    tied = f"{PREFIX}{name}.modules_to_save.weight" in file.shapes  # to one that is named, with ensure_weight_tying
    return tied or any(is_suffix(entry, name) for entry in file.config.modules_to_save or ())


def _keys_of_tables(file: AdapterFile, model: nn.Module, known: Mapping[str, Tensor]) -> dict[str, str]:
    """Keys of whole tables in a file -> the name of the model's table; not adapted layers'."""
    names = {id(weight): name for name, weight in known.items()}
    weights = {
        f"{PREFIX}{name}{infix}.weight": (name, getattr(innermost(module), "weight", None))
        for name, module in outside_adapters(model, remove_duplicate=False)
        if not name.endswith(".base_layer")
        for infix in ("", *INFIXES)
    }
    owners = {}
    for key, shape in file.shapes.items():
        name, weight = weights.get(key, ("", None))
        if (
            not isinstance(weight, Tensor)
            or id(weight) not in names
            or len(shape) != 2
            or file.dtypes[key] not in FLOATS
        ):
            continue
        if _trains(file, key) and not key.endswith(COPY):
            continue  # PEFT repeats the trained copy here
        if shape == tuple(weight.shape):
            owners[key] = names[id(weight)]
        elif shape[1:] == weight.shape[1:]:
            raise CheckpointError(
                f"{file.path} is for a vocabulary of {shape[0]} rows, and {name} has {len(weight)}. First "
                f"model.resize_token_embeddings({shape[0]})."
            )
    return owners


@torch.no_grad()
def _differing_rows(table: Tensor, weight: Tensor) -> list[int]:
    """The rows of a table in a file that are not the model's; one of the two may be rounded to half precision.

    New rows of two resizings may be almost equal, near the mean of all, so no other difference is tolerated.
    """
    here = weight.detach().cpu()
    narrow = min(table.dtype, here.dtype, key=lambda dtype: dtype.itemsize)
    return (table.to(narrow) != here.to(narrow)).any(1).nonzero().flatten().tolist()


def resize_hint(model: nn.Module, there: tuple[int, ...], here: tuple[int, ...]) -> str:
    """Advice if two shapes of one tensor differ as vocabularies do, else nothing."""
    pairs = [(a, b) for a, b in zip(there, here, strict=False) if a != b]
    sizes = {len(table.weight) for table in tables(model).values()}
    if len(there) == len(here) and len(pairs) == 1 and pairs[0][1] in sizes:
        return f" If its vocabulary was resized: model.resize_token_embeddings({pairs[0][0]}) first."
    return ""
