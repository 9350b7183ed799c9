"""Loading the rows that a vocabulary gained: whole tables in a file, as PEFT writes them.

They become rows of tokens, and the base stays as it is. Where the adapter acts on the table itself, or its method has no rows
of tokens, they take the places of those that resizing the base drew at random, as in PEFT.
"""

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
from minipeft.errors import CheckpointError, shown, warn
from minipeft.files.format import FLOATS, AdapterFile
from minipeft.files.resized_vocabulary import IN_LAYER, OPTION, ROWS, Table, base_rows, ids_by_name, tables
from minipeft.injection.build import TableRows
from minipeft.injection.module_tree import outside_adapters, wrappers
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
    base: tuple[TableRows, ...] = ()  # those that the base itself gets


def find_new_rows(file: AdapterFile, model: nn.Module) -> NewRows:
    """Compare whole tables in a file with the model's; the rows that differ are to be loaded.

    Raises:
        CheckpointError: a table has another number of rows than the model's, or is damaged, or two that are tied differ; or
            rows are for the base itself, which other adapters use already or which is not in memory.
    """
    known = tables(model)
    if not known:
        return NewRows(file.config)
    owners = _keys_of_tables(file, model, {name: table.weight for name, table in known.items()})
    found = _tables_in(file, owners)
    here = values_of(model, {name: known[name].weight for name in found})
    ids = {name: _differing_rows(table, here[name]) for name, table in found.items()}
    ids = {name: rows for name, rows in ids.items() if rows and 2 * len(rows) <= len(found[name])}
    copied = frozenset(key for key, owner in owners.items() if owner in ids and _trains(file, key))
    ids = {name: rows for name, rows in ids.items() if any(owners[key] == name for key in owners.keys() - copied)}
    # The adapter acts on these itself, or trains a copy of what they are tied to, so no adapter of rows has room there.
    taken = {owner for key, owner in owners.items() if _is_in_layer(key)} | _trained_tables(file, model, known)
    for_base = ids if not _has_option(file) else {name: rows for name, rows in ids.items() if name in taken}
    trained = {*(getattr(file.config, "token_indices", None) or ())}  # which the adapter has itself
    for_base = {n: [row for row in rows if n not in taken or row not in trained] for n, rows in for_base.items()}
    base = _rows_of_base(file, model, {name: rows for name, rows in for_base.items() if rows}, found)
    ids = {name: rows for name, rows in ids.items() if name not in for_base}
    loaded = {*ids, *(table.name for table in base), *(name for name, rows in for_base.items() if not rows)}
    new = NewRows(file.config, {}, copied | {key for key, owner in owners.items() if owner in loaded}, base)
    return _with_rows(file, ids_by_name(model, getattr(file.config, OPTION)), ids, found, new) if ids else new


def _tables_in(file: AdapterFile, owners: Mapping[str, str]) -> dict[str, Tensor]:
    """The whole tables in a file, by the names of the model's."""
    values, found = file.read(owners), dict[str, Tensor]()
    for key, owner in owners.items():
        if not torch.equal(found.setdefault(owner, values[key]), values[key]):
            raise CheckpointError(f"{file.path}: {key} differs from {owner}, to which it is tied.")
    return found


def warn_of_missing_rows(file: AdapterFile, model: nn.Module) -> None:
    """Warn if a file brings one whole table of a resized vocabulary, and nothing of the other one's new rows.

    PEFT writes the table that LoRA acts on, and not the other.
    """
    known = tables(model)
    owners = _keys_of_tables(file, model, {name: table.weight for name, table in known.items()})
    brought = {name for name in known if any(key.startswith(f"{PREFIX}{name}.") for key in file.shapes)}
    for name in known.keys() - brought - {*owners.values()} if owners else ():
        size, rows = base_rows(model, name, known[name]), len(known[name].weight)
        if size is not None and size < rows:
            warn(
                f"{file.path.parent} brings nothing of rows {size} to {rows - 1} of {name}, which resizing drew at "
                "random, so results may differ from those in training."
            )


def _trained_tables(file: AdapterFile, model: nn.Module, known: Mapping[str, Table]) -> set[str]:
    """The tables that a file has a trained copy of, for one of the layers that share each."""
    names = {id(table.weight): name for name, table in known.items()}
    holders = [(name, getattr(innermost(each), "weight", None)) for name, each in outside_adapters(model)]
    trained = {id(weight) for name, weight in holders if _trains(file, f"{PREFIX}{name}.weight")}
    return {name for weight, name in names.items() if weight in trained}


def _is_in_layer(key: str) -> bool:
    return key.endswith(IN_LAYER) and not key.endswith(f"{INFIXES[0]}.weight")


def _has_option(file: AdapterFile) -> bool:
    return OPTION in {f.name for f in dataclasses.fields(file.config)}


def _rows_of_base(
    file: AdapterFile, model: nn.Module, ids: Mapping[str, list[int]], found: Mapping[str, Tensor]
) -> tuple[TableRows, ...]:
    """The rows that are for the base itself, if resizing it drew all of them at random."""
    known, rows = tables(model), []
    for name, places in ids.items():
        weight, size = known[name].weight, base_rows(model, name, known[name])
        if size is None or places[0] < size:
            continue  # which is refused when the keys are compared
        here = isinstance(weight, nn.Parameter) and not weight.is_meta
        advice = None if here else "with all of its weights in memory"
        if next(wrappers(model), None) is not None:
            advice = "before its other adapters"
        if advice is not None:
            raise CheckpointError(
                f"{file.path} brings rows {shown(places)} of {name}, where resizing drew others here, and the base itself has to "
                f"take them. Load this adapter {advice}, or resize the base with the seed of that run."
            )
        rows.append(TableRows(name, weight, places, found[name][places]))
    return tuple(rows)


def _with_rows(
    file: AdapterFile,
    trained: Mapping[str, list[int]],
    ids: Mapping[str, list[int]],
    found: Mapping[str, Tensor],
    new: NewRows,
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
    return NewRows(config, values, new.done | set(before.values()), new.base)


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
        for infix in ("", ".base_layer", *INFIXES)
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
