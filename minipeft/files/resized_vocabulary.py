"""The two tables of a vocabulary, and saving the rows that they gained since the base was loaded.

New rows start from random values, and whoever resizes the same base again gets others, so an adapter's file has to bring
them along: next to a LoRA adapter on other layers as rows of ``trainable_token_indices``, which PEFT reads too, else as
whole tables, as PEFT always does. `minipeft.files.new_rows` reads either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.config.patterns import is_suffix
from minipeft.ecosystem.transformers_model import input_embedding, is_from_checkpoint, output_head, vocabulary_size
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import ConfigError, StateError, shown, told, warn
from minipeft.files.base_checkpoint import base_config, stored_rows
from minipeft.files.save import tensors_from_state
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import outside_adapters, own_bias, wrappers
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.wrapper import Wrapper, innermost
from minipeft.kernels.functional import is_divided
from minipeft.layers.offloaded import values_of

OPTION, ROWS = "trainable_token_indices", "token_adapter.trainable_tokens_delta"
IN_LAYER = ".base_layer.weight"  # of a table that an adapter acts on


class Table(NamedTuple):
    """One table: the module in the model, perhaps a wrapper, and its weight (tokens, width)."""

    module: nn.Module
    weight: Tensor


def tables(model: nn.Module) -> dict[str, Table]:
    """The tables of a transformers model by name; of two that share a weight, only the first."""
    found: dict[int, tuple[str, Table]] = {}
    for module in (input_embedding(model), output_head(model)):
        weight = None if module is None else getattr(innermost(module), "weight", None)
        if module is None or not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            continue
        name = _name_in(model, module)
        if name is not None:
            found.setdefault(id(weight), (name, Table(module, weight)))
    return dict(found.values())


def _name_in(model: nn.Module, module: nn.Module) -> str | None:
    return next((name for name, other in outside_adapters(model) if other is module), None)


def base_vocabulary(model: nn.Module) -> int | None:
    """``vocab_size`` in the ``config.json`` of the base that the model was loaded from, if that is on this machine."""
    values = base_config(model)
    for part in (values.get("text_config"), values):
        size = part.get("vocab_size") if isinstance(part, dict) else None
        if isinstance(size, int):
            return size
    return None


def base_rows(model: nn.Module, name: str, table: Table) -> int | None:
    """How many rows of a table the base has, if that is on this machine: perhaps more than its vocabulary.

    mllama has 8 for images besides, and some tables are padded. The checkpoint says so; without it, a table that is
    still the one that was loaded, for a vocabulary of unchanged size, was not resized.
    """
    size = base_vocabulary(model)
    if size is None or len(table.weight) <= size:
        return size
    stored = stored_rows(model, name, table.weight.shape[1])
    if stored is not None:
        return max(stored, size)
    untouched = isinstance(table.weight, nn.Parameter) and is_from_checkpoint(table.weight)
    return len(table.weight) if untouched and vocabulary_size(model) == size else size


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
    if save is False:
        return dict(tensors), dict(config)
    if save != "auto":
        raise ConfigError(f'save_embedding_layers must be True, False or "auto", not {told(save)}.')
    size = base_vocabulary(model)
    if size is None:
        return dict(tensors), dict(config)
    _warn_of_flat_tables(model, size)
    # In each tensor the rows that train come first, then those that were only added.
    all_tensors, trained = dict(tensors), ids_by_name(model, config.get(OPTION))
    ids = dict(trained)
    for name, table in tables(model).items():
        base_size = base_rows(model, name, table) or 0
        missing = sorted(set(range(base_size, len(table.weight))) - set(trained.get(name, ())))
        if not missing:
            continue
        taken = _is_taken(model, table, adapter_name)
        if taken and set(missing) <= set(config.get("token_indices") or ()):
            continue
        key = f"{PREFIX}{name}.{ROWS}"
        if OPTION not in config or (name not in trained and (taken or has_bias(model, table))):
            all_tensors |= _values(model, _whole_table(model, name, table, adapter_name), state)
            continue
        _check_unmerged(model, name, table)
        before = [all_tensors[key]] if name in trained else []
        rows = _values(model, {name: table.weight}, state)[name].detach()[missing]
        all_tensors[key] = torch.cat([*before, rows.to(before[0])]) if before else rows
        entries = _entries_of(model, table, trained) if before else ()
        ids |= {entry: [*trained.get(name, ()), *missing] for entry in (name, *entries)}
    return all_tensors, dict(config) if ids == trained else {**config, OPTION: ids}


def _warn_of_flat_tables(model: nn.Module, base_size: int) -> None:
    """Warn that new rows are in no file, since torch's first FSDP leaves no table in the shape of one."""
    weights = [
        getattr(innermost(each), "weight", None) for each in (input_embedding(model), output_head(model)) if each
    ]
    size = vocabulary_size(model) or 0
    if size > base_size and any(isinstance(weight, Tensor) and weight.ndim == 1 for weight in weights):
        warn(
            f"the rows that the vocabulary gained, {base_size} to {size - 1}, are in no file: FSDP1 holds their tables in pieces. "
            "Save the resized base before wrapping it and adapt that, or use FSDP2."
        )


def resized_tables(model: nn.Module) -> list[Tensor]:
    """The weights of the tables that gained rows since the base was loaded, if that is on this machine."""
    sizes = ((table.weight, base_rows(model, name, table)) for name, table in tables(model).items())
    return [weight for weight, size in sizes if size is not None and len(weight) > size]


def _values(model: nn.Module, found: Mapping[str, Tensor], state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    divided = any(map(is_divided, found.values()))
    return values_of(model, found) if state is None or not divided else tensors_from_state(model, found, state)


def brought_rows(config: Mapping[str, Any]) -> Mapping[str, Collection[int]]:
    """Of a configuration that `with_tables` returns, the rows of each table that the file brings, by the table's name."""
    option = config.get(OPTION)
    return option if isinstance(option, Mapping) else {}


def ids_by_name(model: nn.Module, option: Any) -> dict[str, list[int]]:
    """The token ids in ``trainable_token_indices`` of a file's configuration, by the names of the tables."""
    names = list(tables(model))
    if isinstance(option, Mapping):
        return {next((name for name in names if is_suffix(entry, name)), entry): ids for entry, ids in option.items()}
    return {names[0]: option} if option and names else {}


def _copies(module: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter has a trained copy of the table, which brings all rows."""
    return isinstance(module, SavedModule) and adapter_name in module.adapters


def _tied_apart(model: nn.Module, table: Table, adapter_name: str) -> str | None:
    """The name of the head that is tied to a table, if the trained copy of the table is not its own."""
    head = output_head(model)
    if head is None or head is table.module or getattr(innermost(head), "weight", None) is not table.weight:
        return None
    return None if _copies(head, adapter_name) else _name_in(model, head)


def _is_taken(model: nn.Module, table: Table, adapter_name: str) -> bool:
    """Whether the adapter acts on this table, here or in a layer tied to it, or has a trained copy of one of them."""
    return any(adapter_name in wrapper.adapters for _, wrapper in _holders(model, table))


def has_bias(model: nn.Module, table: Table) -> bool:
    """Whether a layer with the weight of a table has a bias, which PEFT leaves out next to rows of tokens."""
    layers = (innermost(each) for _, each in outside_adapters(model))
    return any(own_bias(each) is not None for each in layers if getattr(each, "weight", None) is table.weight)


def _holders(model: nn.Module, table: Table) -> list[tuple[str, Wrapper]]:
    """The wrappers of the layers that have the weight of a table."""
    return [(name, each) for name, each in wrappers(model) if getattr(innermost(each), "weight", None) is table.weight]


def _entries_of(model: nn.Module, table: Table, ids: Mapping[str, Any]) -> list[str]:
    """Of names in ``trainable_token_indices`` those of layers with the weight of a table."""
    layers = [path for path, _ in _holders(model, table)]
    return [entry for entry in ids if any(is_suffix(entry, path) for path in layers)]


def _check_unmerged(model: nn.Module, name: str, table: Table) -> None:
    merged = [each for _, each in _holders(model, table) if isinstance(each, AdaptedLayer) and each.merged]
    if merged:
        raise StateError(
            f"{shown(merged[0].merged)} is merged into {name}, and rows of that are to be saved as the base has them. Call "
            "unmerge_adapter() first."
        )


def _whole_tables(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    whole, found = dict[str, Tensor](), tables(model)
    if not found:
        raise ConfigError(
            f"save_embedding_layers=True: {type(model).__name__} names no input embedding (get_input_embeddings); leave "
            "it at 'auto'."
        )
    for name, table in found.items():
        layer = table.module
        if isinstance(layer, AdaptedLayer) and adapter_name in layer.adapters:
            if layer.adapter(adapter_name).changed_rows() is not None:
                raise ConfigError(
                    f"save_embedding_layers=True: rows of {name} train, and the file holds those; leave it at 'auto'."
                )
        whole |= _whole_table(model, name, table, adapter_name)
    return whole


def _whole_table(model: nn.Module, name: str, table: Table, adapter_name: str) -> dict[str, Tensor]:
    """A table under the key that PEFT gives it; of one with a trained copy, what is tied to it and does not use the copy."""
    _check_unmerged(model, name, table)
    if _copies(table.module, adapter_name):
        tied = _tied_apart(model, table, adapter_name)
        return {} if tied is None else {f"{PREFIX}{tied}.weight": table.weight}
    holders = [(path, each) for path, each in _holders(model, table) if adapter_name in each.adapters]
    adapted = [path for path, each in holders if isinstance(each, AdaptedLayer)]
    return {f"{PREFIX}{adapted[0]}{IN_LAYER}" if adapted else f"{PREFIX}{name}.weight": table.weight}
