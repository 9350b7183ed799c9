"""Loading the rows that a vocabulary gained: whole tables in a file, as PEFT writes them.

They become rows of tokens, and the base stays as it is. Where the adapter acts on the table itself, or its method has no rows
of tokens, they take the places of those that resizing the base drew at random, as in PEFT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.patterns import is_suffix
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import CheckpointError, shown
from minipeft.files.format import FLOATS, AdapterFile
from minipeft.files.resized_vocabulary import IN_LAYER, OPTION, ROWS, Table, base_rows, has_bias, ids_by_name, tables
from minipeft.injection.build import TableRows
from minipeft.injection.module_tree import outside_adapters, wrappers
from minipeft.injection.wrapper import innermost
from minipeft.kernels.functional import agree
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
    lacking: tuple[str, ...] = ()  # what to warn of


def find_new_rows(file: AdapterFile, model: nn.Module) -> NewRows:
    """Compare whole tables in a file with the model's; the rows that differ are to be loaded.

    Raises:
        CheckpointError: a table has another number of rows than the model's, or is damaged, or two that are tied differ; or
            rows are for the base itself, which other adapters use already or which is not in memory.
    """
    known = tables(model)
    layers = _layers_of_tables(model, known) if known else {}
    owners = _keys_of_tables(file, layers, known)
    if not owners:
        return NewRows(file.config)
    found = _tables_in(file, owners)
    ids = _differing_rows(model, known, found)
    copied = frozenset(key for key, owner in owners.items() if owner in ids and _trains(file, key))
    ids = {name: rows for name, rows in ids.items() if any(owners[key] == name for key in owners.keys() - copied)}
    biased = {name for name in ids if getattr(file.config, "bias", "") == "all" and has_bias(model, known[name])}
    for_base = _ids_for_base(file, layers, owners, ids) | {name: ids[name] for name in biased}
    for_rows = {name: rows for name, rows in ids.items() if name not in for_base}
    base = _rows_of_base(file, model, known, for_base, found)
    loaded = {*for_rows, *(table.name for table in base)}
    done = copied | {key for key, owner in owners.items() if owner in loaded}
    new = NewRows(file.config, {}, done, base, tuple(_lacking(file, model, known, owners)))
    return _with_rows(file, ids_by_name(model, getattr(file.config, OPTION)), for_rows, found, new) if for_rows else new


def _ids_for_base(
    file: AdapterFile, layers: Mapping[str, str], owners: Mapping[str, str], ids: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """Of these rows, those of tables where no adapter of rows has room: all of them, if the method has no such adapter."""
    # The adapter acts on these tables itself, or trains a copy of what they are tied to.
    taken = {owner for key, owner in owners.items() if _is_in_layer(key)}
    taken |= {table for name, table in layers.items() if _trains(file, f"{PREFIX}{name}.weight")}
    has_option = OPTION in {f.name for f in dataclasses.fields(file.config)}
    found = {name: rows for name, rows in ids.items() if name in taken or not has_option}
    own = {*(getattr(file.config, "token_indices", None) or ())}  # which train, so the adapter has them
    return found | {name: [row for row in found[name] if row not in own] for name in found.keys() & taken}


def _layers_of_tables(model: nn.Module, known: Mapping[str, Table]) -> dict[str, str]:
    """The names of all layers that have a table as their weight -> the name of the table."""
    names = {id(table.weight): name for name, table in known.items()}
    layers = outside_adapters(model, remove_duplicate=False)
    weights = {name: id(getattr(innermost(each), "weight", None)) for name, each in layers}
    return {n: names[w] for n, w in weights.items() if w in names and not n.endswith(".base_layer")}


def _tables_in(file: AdapterFile, owners: Mapping[str, str]) -> dict[str, Tensor]:
    """The whole tables in a file, by the names of the model's."""
    values, found = file.read(owners), dict[str, Tensor]()
    for key, owner in owners.items():
        if not torch.equal(found.setdefault(owner, values[key]), values[key]):
            raise CheckpointError(f"{file.path}: {key} differs from {owner}, to which it is tied.")
    return found


def _lacking(
    file: AdapterFile, model: nn.Module, known: Mapping[str, Table], owners: Mapping[str, str]
) -> Iterator[str]:
    """What to say of new rows of which a file brings nothing: PEFT writes the table that LoRA acts on, and not the other."""
    for name in known.keys() - {*owners.values()}:
        size, rows = base_rows(model, name, known[name]), len(known[name].weight)
        if size is None or size >= rows or any(key.startswith(f"{PREFIX}{name}.") for key in file.shapes):
            continue
        yield (
            f"{file.path.parent} brings nothing of rows {size} to {rows - 1} of {name}, which resizing drew at random, so "
            "results may differ from those in training."
        )


def _is_in_layer(key: str) -> bool:
    return key.endswith(IN_LAYER) and not key.endswith(f"{INFIXES[0]}.weight")


def _rows_of_base(
    file: AdapterFile,
    model: nn.Module,
    known: Mapping[str, Table],
    ids: Mapping[str, list[int]],
    found: Mapping[str, Tensor],
) -> tuple[TableRows, ...]:
    """The rows that are for the base itself, if resizing it drew all of them at random."""
    rows = []
    for name, places in ids.items():
        weight, size = known[name].weight, base_rows(model, name, known[name])
        if size is None or min(places, default=size) < size:
            continue  # which is refused when the keys are compared
        here = isinstance(weight, nn.Parameter) and not weight.is_meta
        advice = None if here else "with all of its weights in memory"
        if next(wrappers(model), None) is not None:
            advice = "before its other adapters"
        if places and advice is not None:
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
    return dataclasses.replace(new, config=config, values=values, done=new.done | set(before.values()))


def _trains(file: AdapterFile, key: str) -> bool:
    """Whether a table is a copy of a module that trains in full, whose trained rows the file has too."""
    name = key.removeprefix(PREFIX).removesuffix(COPY).removesuffix(".weight")
    tied = f"{PREFIX}{name}.modules_to_save.weight" in file.shapes  # to one that is named, with ensure_weight_tying
    return tied or any(is_suffix(entry, name) for entry in file.config.modules_to_save or ())


def _keys_of_tables(file: AdapterFile, layers: Mapping[str, str], known: Mapping[str, Table]) -> dict[str, str]:
    """Keys of whole tables in a file -> the name of the model's table."""
    places = {
        f"{PREFIX}{name}{infix}.weight": table
        for name, table in layers.items()
        for infix in ("", ".base_layer", *INFIXES)
    }
    owners = {}
    for key in filter(places.__contains__, file.shapes):
        shape, name = file.shapes[key], places[key]
        here = tuple(known[name].weight.shape)
        if len(shape) != 2 or file.dtypes[key] not in FLOATS:
            continue
        if _trains(file, key) and not key.endswith(COPY):
            continue  # PEFT repeats the trained copy here
        if shape == here:
            owners[key] = name
        elif shape[1:] == here[1:]:
            raise CheckpointError(
                f"{file.path} is for a vocabulary of {shape[0]} rows, and {name} has {here[0]}. First "
                f"model.resize_token_embeddings({shape[0]})."
            )
    return owners


@torch.no_grad()
def _differing_rows(model: nn.Module, known: Mapping[str, Table], found: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The rows of each table in a file that are not the model's, at most half of them; the file or the model may be rounded.

    New rows of two resizings may be almost equal, near the mean of all, so no other difference is tolerated.
    """
    differing = {}
    for name, weight in values_of(model, {name: known[name].weight for name in found}).items():
        table = found[name]
        rows = (~agree(table, weight.detach().cpu())).any(1).nonzero().flatten().tolist()
        if rows and 2 * len(rows) <= len(table):
            differing[name] = rows
    return differing


def resize_hint(model: nn.Module, there: tuple[int, ...], here: tuple[int, ...]) -> str:
    """Advice if two shapes of one tensor differ as vocabularies do, else nothing."""
    pairs = [(a, b) for a, b in zip(there, here, strict=False) if a != b]
    sizes = {len(table.weight) for table in tables(model).values()}
    if len(there) == len(here) and len(pairs) == 1 and pairs[0][1] in sizes:
        return f" If its vocabulary was resized: model.resize_token_embeddings({pairs[0][0]}) first."
    return ""
