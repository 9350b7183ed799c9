"""The tables of a vocabulary, two in most models, and saving the rows that they gained since the base was loaded.

New rows start from random values, and whoever resizes the same base again gets others, so an adapter's file has to bring
them along: next to a LoRA adapter on other layers as rows of ``trainable_token_indices``, which PEFT reads too, else as
whole tables, as PEFT always does. `minipeft.files.new_rows` reads either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.patterns import is_suffix
from minipeft.ecosystem.transformers_model import (
    input_embedding,
    is_from_checkpoint,
    output_head,
    per_layer_embedding,
    vocabulary_size,
    vocabulary_tables,
)
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import ConfigError, StateError, shown, told, warn
from minipeft.files.base_checkpoint import base_config, stored_rows
from minipeft.files.save import tensors_from_state
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import outside_adapters, own_bias
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.wrapper import Wrapper, innermost
from minipeft.kernels.functional import is_divided
from minipeft.layers.offloaded import values_of

OPTION = "trainable_token_indices"
# The options of a model's config that say how many tokens: of all tables but Gemma's second one, and of that.
VOCABULARY, PER_LAYER = "vocab_size", "vocab_size_per_layer_input"
IN_LAYER = ".base_layer.weight"  # of a table that an adapter acts on


@dataclass(frozen=True, eq=False)
class Table:
    """One table of a model's vocabulary.

    Attributes:
        model: the model.
        name: of its module in the model.
        module: the module, perhaps a wrapper.
        weight: shape (tokens, width).
        size: the option of the model's config that says how many tokens.
        holders: finds the `layers` of all tables of the model, by the ids of their weights.
    """

    model: nn.Module
    name: str
    module: nn.Module
    weight: Tensor
    size: str
    holders: Callable[[], Mapping[int, list[tuple[str, nn.Module]]]]

    @property
    def layers(self) -> list[tuple[str, nn.Module]]:
        """The layers that have this weight, by each of their names, and the wrappers around them."""
        return self.holders()[id(self.weight)]

    @property
    def rows_key(self) -> str:
        """The key in a file of the rows of this table that train."""
        return f"{PREFIX}{self.name}.token_adapter.trainable_tokens_delta"

    @functools.cached_property
    def base_rows(self) -> int | None:
        """How many rows the base has, if that is on this machine: perhaps more than its vocabulary.

        mllama has 8 for images besides, and some tables are padded. The checkpoint says so; without it, a table that is
        still the one that was loaded, for a vocabulary of unchanged size, was not resized.
        """
        size, weight = base_vocabulary(self.model, self.size), self.weight
        if size is None or len(weight) <= size:
            return size
        stored = stored_rows(self.model, self.name, weight.shape[1])
        if stored is not None:
            return max(stored, size)
        untouched = isinstance(weight, nn.Parameter) and is_from_checkpoint(weight)
        return len(weight) if untouched and vocabulary_size(self.model, self.size) == size else size

    @property
    def is_resized(self) -> bool:
        """Whether it gained rows since the base was loaded."""
        return self.base_rows is not None and len(self.weight) > self.base_rows

    @property
    def has_bias(self) -> bool:
        """Whether a layer with this weight has a bias, which PEFT leaves out next to rows of tokens."""
        return any(own_bias(innermost(each)) is not None for _, each in self.layers)

    def is_taken_by(self, adapter_name: str) -> bool:
        """Whether an adapter acts on this table, here or in a layer tied to it, or has a trained copy of one of them."""
        return any(isinstance(each, Wrapper) and adapter_name in each.adapters for _, each in self.layers)

    def entries(self, ids: Iterable[str]) -> list[str]:
        """Those of these names in ``trainable_token_indices`` that are adapted layers with this weight."""
        layers = [name for name, each in self.layers if isinstance(each, Wrapper)]
        return [entry for entry in ids if any(is_suffix(entry, name) for name in layers)]

    def check_unmerged(self) -> None:
        """Raise StateError if an adapter is merged into the table, which is to be saved as the base has it."""
        for _, each in self.layers:
            if isinstance(each, AdaptedLayer) and each.merged:
                raise StateError(
                    f"{shown(each.merged)} is merged into {self.name}, and rows of that are to be saved as the base has them. "
                    "Call unmerge_adapter() first."
                )

    def whole(self, adapter_name: str) -> dict[str, Tensor]:
        """The table under the key that PEFT gives it; if it has a trained copy, a tied head that does not use the copy."""
        self.check_unmerged()
        if _copies(self.module, adapter_name):
            apart = output_head(self.model)
            tied = [name for name, each in self.layers if each is apart and not _copies(each, adapter_name)]
            return {f"{PREFIX}{name}.weight": self.weight for name in tied[:1]}
        adapted = (n for n, each in self.layers if isinstance(each, AdaptedLayer) and adapter_name in each.adapters)
        name = next(adapted, None)
        return {f"{PREFIX}{self.name}.weight" if name is None else f"{PREFIX}{name}{IN_LAYER}": self.weight}


def _copies(module: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter has a trained copy of the table, which brings all rows."""
    return isinstance(module, SavedModule) and adapter_name in module.adapters


def tables(model: nn.Module) -> dict[str, Table]:
    """The tables of a transformers model by name; of two that share a weight, only the first."""
    per_layer = per_layer_embedding(model)
    modules = {id(each): each for each in vocabulary_tables(model)}
    names: dict[int, str] = {}
    copies: tuple[str, ...] = ()  # where trained copies lie: T5Gemma's head holds the table, and the file has all of it
    for name, module in outside_adapters(model) if modules else ():
        if isinstance(module, SavedModule):
            copies = (*copies, f"{name}.adapters.")
        if id(module) in modules and not name.startswith(copies):
            names[id(module)] = name
            if len(names) == len(modules):
                break
    found: dict[int, Table] = {}
    holders = functools.cache(functools.partial(_holders, model, found))
    for key, module in modules.items():
        weight = _weight_of(module)
        if key in names and isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
            size = PER_LAYER if module is per_layer else VOCABULARY
            found.setdefault(id(weight), Table(model, names[key], module, weight, size, holders))
    return {table.name: table for table in found.values()}


def _holders(model: nn.Module, known: Mapping[int, Table]) -> dict[int, list[tuple[str, nn.Module]]]:
    """The layers that have the weight of a table, by the id of that."""
    found: dict[int, list[tuple[str, nn.Module]]] = {key: [] for key in known}
    for name, module in outside_adapters(model, remove_duplicate=False):
        if (key := id(getattr(innermost(module), "weight", None))) in found:  # as `_weight_of`, in a call less
            found[key].append((name, module))
    return found


def _weight_of(module: nn.Module) -> Any:
    return getattr(innermost(module), "weight", None)


def base_vocabulary(model: nn.Module, option: str = VOCABULARY) -> int | None:
    """The size in the ``config.json`` of the base that the model was loaded from, if that is on this machine."""
    values = base_config(model)
    for part in (values.get("text_config"), values):
        size = part.get(option) if isinstance(part, dict) else None
        if isinstance(size, int):
            return size
    return None


def ids_by_name(names: Iterable[str], option: Any) -> dict[str, list[int]]:
    """The token ids in ``trainable_token_indices`` of a file's configuration, by the names of the tables."""
    names = list(names)
    if isinstance(option, Mapping):
        return {next((name for name in names if is_suffix(entry, name)), entry): ids for entry, ids in option.items()}
    return {names[0]: option} if option and names else {}


def with_tables(
    model: nn.Module,
    adapter_name: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    save: bool | str,
    state: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and configuration, plus the rows of the model's tables that have to be saved too.

    Args:
        model: the adapted model.
        adapter_name: which of its adapters.
        tensors: as `minipeft.files.save.adapter_tensors` returns them.
        config: as `minipeft.files.save.file_config` returns it.
        save: "auto": the rows that the base lacks, if the vocabulary was resized; True: whole tables; False: nothing.
        state: a gathered state of the model, for tables that are divided over processes.

    Raises:
        ConfigError: `save` is something else; or it is True and rows of a table train, or the model has no table.
        StateError: an adapter is merged into a table to save.
    """
    if save is True:
        return {**tensors, **_values(model, _whole_tables(model, adapter_name), state)}, dict(config)
    if save is not False and save != "auto":
        raise ConfigError(f'save_embedding_layers must be True, False or "auto", not {told(save)}.')
    size = None if save is False else base_vocabulary(model)
    if size is None:
        return dict(tensors), dict(config)
    _warn_of_flat_tables(model, size)
    known = tables(model)
    whole, added = _new_rows(known, adapter_name, config)
    result = {**tensors, **_values(model, whole, state)}
    if not added:
        return result, dict(config)
    trained = ids_by_name(known, config.get(OPTION))
    weights = _values(model, {name: known[name].weight for name in added}, state)
    option = dict(trained)
    for name, ids in added.items():  # behind the rows that train
        key, rows, before = known[name].rows_key, weights[name].detach()[ids], trained.get(name)
        result[key] = rows if before is None else torch.cat([tensors[key], rows.to(tensors[key])])
        entries = [name] if before is None else [name, *known[name].entries(trained)]
        option |= {entry: [*(before or ()), *ids] for entry in entries}
    return result, {**config, OPTION: option}


def _new_rows(
    known: Mapping[str, Table], adapter_name: str, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """What a file has to bring of the tables that grew: whole tables by key, and the ids of new rows by table."""
    trained = ids_by_name(known, config.get(OPTION))
    whole, added = dict[str, Tensor](), dict[str, list[int]]()
    for name, table in known.items():
        missing = sorted(set(range(table.base_rows or 0, len(table.weight))) - set(trained.get(name, ())))
        if not missing or (table.is_taken_by(adapter_name) and {*missing} <= {*(config.get("token_indices") or ())}):
            continue
        if OPTION not in config or (name not in trained and (table.is_taken_by(adapter_name) or table.has_bias)):
            whole |= table.whole(adapter_name)
        else:
            table.check_unmerged()
            added[name] = missing
    return whole, added


def _warn_of_flat_tables(model: nn.Module, base_size: int) -> None:
    """Warn that new rows are in no file, since torch's first FSDP leaves no table in the shape of one."""
    weights = [_weight_of(each) for each in (input_embedding(model), output_head(model)) if each is not None]
    size = vocabulary_size(model) or 0
    if size > base_size and any(isinstance(weight, Tensor) and weight.ndim == 1 for weight in weights):
        warn(
            f"the rows that the vocabulary gained, {base_size} to {size - 1}, are in no file: FSDP1 holds their tables in pieces. "
            "Save the resized base before wrapping it and adapt that, or use FSDP2."
        )


def _values(model: nn.Module, found: Mapping[str, Tensor], state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    divided = any(map(is_divided, found.values()))
    return values_of(model, found) if state is None or not divided else tensors_from_state(model, found, state)


def _whole_tables(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    whole, found = dict[str, Tensor](), tables(model)
    if not found:
        raise ConfigError(
            f"save_embedding_layers=True: {type(model).__name__} names no input embedding (get_input_embeddings); leave "
            "it at 'auto'."
        )
    for name, table in found.items():
        if table.size != VOCABULARY and not table.is_resized:
            continue  # of Gemma 3n it is larger than all the rest
        layer = table.module
        if isinstance(layer, AdaptedLayer) and adapter_name in layer.adapters:
            if layer.adapter(adapter_name).changed_rows() is not None:
                raise ConfigError(
                    f"save_embedding_layers=True: rows of {name} train, and the file holds those; leave it at 'auto'."
                )
        whole |= table.whole(adapter_name)
    return whole


def brought_rows(config: Mapping[str, Any]) -> Mapping[str, Collection[int]]:
    """The rows of each table that a file brings, by the table's name, from the configuration that `with_tables` returned."""
    option = config.get(OPTION)
    return option if isinstance(option, Mapping) else {}
