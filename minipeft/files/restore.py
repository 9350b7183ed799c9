"""Restoring adapters from a directory or from tensors in memory: the values change, the parameters stay the same objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import CheckpointError, ConfigError, StateError, all_or_nothing, shown, told
from minipeft.files.base_samples import base_samples
from minipeft.files.compare import Expected, read_values
from minipeft.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from minipeft.files.format import open_adapter
from minipeft.files.peft_extras import followers
from minipeft.files.reading import as_path, reading
from minipeft.files.resized_vocabulary import brought_rows, with_tables
from minipeft.files.save import file_config
from minipeft.files.save_pretrained import DEFAULT, SavableModel, directory_of
from minipeft.injection.module_tree import wrappers_of
from minipeft.injection.state import not_running
from minipeft.kernels.functional import agree, is_divided, is_finite
from minipeft.layers.offloaded import check_values_here
from minipeft.python.interrupts import interrupts_deferred


class RestorableModel(SavableModel):
    """The part of `minipeft.AdaptedModel` that takes an adapter's values from memory."""

    @all_or_nothing
    def set_adapter_state_dict(self, state_dict: Mapping[str, Tensor], adapter_name: str | None = None) -> None:
        """Give an adapter these values, in the parameters that it has: the counterpart of `get_adapter_state_dict`.

        Args:
            state_dict: exactly the tensors of this adapter, under the keys that they have in a file, with or without
                ``base_model.model.``. So PEFT's `get_peft_model_state_dict` gives them, too.
            adapter_name: None: the active one.

        Raises:
            ConfigError: it is no table of tensors.
            CheckpointError: a tensor is missing, unexpected, of another shape or not finite.
            StateError: there is no such adapter, one is merged into the base, this one is offloaded or divided over
                processes, or a batch runs that uses it by ``adapter_names``.
        """
        model = _checked(self)
        name = next(iter(self._state.switch.active), DEFAULT) if adapter_name is None else adapter_name
        values = _fitting(name, model.adapter_state_dict(name), state_dict)
        for path, wrapper in wrappers_of(model, name):
            check_values_here(path, wrapper.adapters[name])
        _write(model, {name: values})


@all_or_nothing
def restore_adapters(model: nn.Module, directory: str | Path) -> None:
    """Give the adapters of a model the values that `save_pretrained` wrote.

    The model has exactly the adapters that the directory holds.

    Raises:
        CheckpointError: a file is damaged, or is for other adapters, another configuration or another base.
        StateError: the model is not adapted, an adapter is merged, FSDP2 has divided the model, or a batch with
            ``adapter_names`` runs.
    """
    live = _checked(model)
    root, wanted = as_path(directory, "directory"), live._state.configs
    with reading(root):
        found = adapters_in(root)
        if found != wanted.keys():
            raise CheckpointError(
                f"{root} holds the adapters {shown(sorted(found))}, and the model has {shown(sorted(wanted))}."
            )
        values = {name: _values(live, name, directory_of(root, name)) for name in wanted}
    _write(live, values)


@all_or_nothing
def restore_adapter(model: nn.Module, adapter_name: str, directory: str | Path) -> None:
    """As `restore_adapters`, for one of them: the directory is the adapter's own, whatever else is in it."""
    live, root = _checked(model), as_path(directory, "directory")
    live._check_known([adapter_name])
    with reading(root):
        values = {adapter_name: _values(live, adapter_name, root)}
    _write(live, values)


def _checked(model: nn.Module) -> SavableModel:
    if not isinstance(model, SavableModel):
        raise StateError(f"{type(model).__name__} is not adapted, so it has no adapters to restore.")
    model._state.check_unmerged()
    return model


def _write(model: SavableModel, values: Mapping[str, Mapping[str, Tensor]]) -> None:
    with not_running(model._state, values), torch.no_grad(), interrupts_deferred():
        for name, tensors in values.items():
            for key, live in model.adapter_state_dict(name).items():
                live.copy_(tensors[key])
    model._state.switch.changes += 1


def adapters_in(root: Path) -> set[str]:
    """Names of the adapters that a directory holds; raises CheckpointError if it is not a directory."""
    if not os.path.isdir(root):
        raise CheckpointError(f"{root} is not a directory, so there is no adapter to restore.")
    folders = {path.name: path for path in root.iterdir() if path.is_dir()}
    return {
        name
        for name, path in {**folders, DEFAULT: root}.items()
        if os.path.exists(path / CONFIG_FILE) or os.path.exists(path / WEIGHTS_FILE)
    }


def _fitting(name: str, live: Mapping[str, Tensor], given: object) -> dict[str, Tensor]:
    """The values that `given` has for all the live tensors of an adapter, and for nothing else."""
    if not isinstance(given, Mapping) or not all(isinstance(value, Tensor) for value in given.values()):
        raise ConfigError(f"state_dict must map names to tensors, as get_adapter_state_dict() does, not {told(given)}.")
    # What all layers share, as VeRA's projections, has a key without the prefix.
    tensors = {key if key in live or f"{key}".startswith(PREFIX) else f"{PREFIX}{key}": t for key, t in given.items()}
    lists = (("missing", live.keys() - tensors.keys()), ("unexpected", tensors.keys() - live.keys()))
    if said := "; ".join(f"{what} {shown(sorted(keys), 3)}" for what, keys in lists if keys):
        raise CheckpointError(f"state_dict does not fit adapter {name!r}: {said}.")
    for key, value in tensors.items():
        if value.shape != live[key].shape:
            shapes = f"{list(value.shape)}, and the adapter's has {list(live[key].shape)}"
            raise CheckpointError(f"state_dict does not fit adapter {name!r}: {key} has the shape {shapes}.")
        if not is_finite(value):
            raise CheckpointError(f"state_dict holds NaN or infinity in {key}.")
    return tensors


def _values(model: SavableModel, name: str, directory: Path) -> dict[str, Tensor]:
    live, config = model.adapter_state_dict(name), file_config(model, model._state.configs[name], name, compact=False)
    if any(map(is_divided, live.values())):
        raise StateError(
            f"the tensors of adapter {name!r} are divided over processes, and those of a file are whole: restore adapters before "
            "fully_shard."
        )
    # If the vocabulary was resized, the file also holds rows of the base, which are only compared.
    file, (tensors, more) = open_adapter(directory), with_tables(model, name, live, config, "auto")
    # PEFT's holds whole tables, and one saved with save_embedding_layers=False holds none.
    brings_rows = all(key in live or key in file.shapes for key in tensors)
    tensors, config = (tensors, more) if brings_rows else (live, config)
    tied = followers(model, model._state.configs[name], name)
    expected = Expected(model, tensors, base_samples(model, name, brought_rows(config)), config, tied=tied)
    values = read_values(file, expected)
    for key, tensor in tensors.items():
        own = live.get(key)
        if tensor is own:
            continue
        trained = 0 if own is None else len(own)
        if not agree(values[key][trained:].to(tensor.device), tensor[trained:]).all():
            raise CheckpointError(
                f"{directory} was trained on another base: the rows that its vocabulary gained differ ({key}). Resize "
                "it with the seed of that run."
            )
        values[key] = values[key][:trained]
    return values
