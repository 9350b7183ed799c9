"""Adapted models in transformers' Trainer: checkpoints of the adapter alone, exact resuming, the best adapter at the end.

A plain ``Trainer`` trains an adapted model and saves its adapter; what it cannot do is read the adapter back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer

from minipeft import checkpoint
from minipeft.adapter_file import CONFIG_FILE, PROVENANCE, WEIGHTS_FILE, open_adapter
from minipeft.config import config_from_dict
from minipeft.errors import CheckpointError, StateError, shown
from minipeft.model import AdaptedModel
from minipeft.same_base import base_samples, check_samples
from minipeft.sharing import DEFAULT, directory_of

RECORD = "minipeft"  # our place in trainer_state.json, among the states of callbacks
TRAINER_STATE = "trainer_state.json"


class AdapterTrainerMixin:
    """Lets a Trainer read adapters back; stands before it: ``class MyTrainer(AdapterTrainerMixin, SFTTrainer)``.

    ``train(resume_from_checkpoint=...)`` goes on with the values, optimizer, data order and dropout of the interrupted
    run, bit for bit on one kind of device, and refuses a checkpoint of another base, configuration or set of adapters.
    ``load_best_model_at_end=True`` puts the best adapter's values back. Every adapter of the model is in every
    checkpoint. A model that is not adapted is the Trainer's own business.
    """

    restores_adapters: ClassVar[bool] = True
    args: Any
    model: Any
    state: Any
    accelerator: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    is_world_process_zero: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(AdapterTrainerMixin)]:
            if "_load_from_checkpoint" in vars(base) and not issubclass(base, AdapterTrainerMixin):
                raise TypeError(
                    f"{cls.__name__}: AdapterTrainerMixin must stand before {base.__name__} to take effect."
                )

    def _adapted(self) -> AdaptedModel | None:
        """The model, where its adapters are ours to restore; FSDP and DeepSpeed have checkpoints of their own."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model if isinstance(model, AdaptedModel) else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        parent: Any = super()
        adapted = self._adapted()
        if adapted is not None:
            attributes = {"active_adapters": adapted.active_adapters}
            self.state.stateful_callbacks[RECORD] = {"args": {}, "attributes": attributes}
        parent._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        parent: Any = super()
        adapted = self._adapted()
        if adapted is None:
            parent._load_from_checkpoint(resume_from_checkpoint, model)
            return
        _check_active(adapted, Path(resume_from_checkpoint))
        restore_adapters(adapted, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        parent: Any = super()
        adapted = self._adapted()
        if adapted is None:
            parent._load_best_model()
        else:
            restore_adapters(adapted, self.state.best_model_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own card, marked as an adapter's, so that the hub shows how to load one."""
        parent: Any = super()
        parent.create_model_card(*args, **kwargs)
        adapted = self._adapted()
        if adapted is not None and self.is_world_process_zero():
            adapted.create_or_update_model_card(self.args.output_dir)


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """transformers' Trainer for adapted models; see `AdapterTrainerMixin`."""


def restore_adapters(model: AdaptedModel, directory: str | Path) -> None:
    """Give the adapters of a model the values that `save_pretrained` wrote; the parameters stay the same objects.

    Args:
        model: has the adapters that lie in the directory, all of them and no other.
        directory: such as a Trainer's checkpoint.

    Raises:
        CheckpointError: other adapters, another configuration or another base; no value has changed.
        StateError: adapters are merged.
    """
    if not isinstance(model, AdaptedModel):
        raise StateError(f"{type(model).__name__} is not adapted, so it has no adapters to restore.")
    if model._state.merged:
        raise StateError("adapters are merged into the base; call unmerge_adapter() first.")
    root = Path(directory)
    found, wanted = _adapters_in(root), model.adapter_configs
    if found != wanted.keys():
        raise CheckpointError(
            f"{root} holds the adapters {shown(sorted(found))}, and the model has {shown(sorted(wanted))}; nothing was restored."
        )
    values = {name: _values(model, name, directory_of(root, name)) for name in wanted}
    with torch.no_grad():
        for name, tensors in values.items():
            for key, live in model.adapter_state_dict(name).items():
                live.copy_(tensors[key])


def _adapters_in(root: Path) -> set[str]:
    if not root.is_dir():
        raise CheckpointError(f"{root} is no directory, so there is no adapter to restore.")
    folders = {path.name: path for path in root.iterdir() if path.is_dir()}
    return {
        name
        for name, path in {**folders, DEFAULT: root}.items()
        if (path / CONFIG_FILE).exists() or (path / WEIGHTS_FILE).exists()
    }


def _values(model: AdaptedModel, name: str, directory: Path) -> Mapping[str, Tensor]:
    """What a directory holds for an adapter of this model, after every check."""
    file = open_adapter(directory)
    here = config_from_dict(checkpoint.file_config(model, model.adapter_configs[name], name)).to_dict()
    there = file.config.to_dict()
    differ = [key for key in here if key not in PROVENANCE and here[key] != there.get(key)]
    if differ:
        said = "; ".join(f"{key} is {there.get(key)!r:.100} there and {here[key]!r:.100} here" for key in differ[:3])
        raise CheckpointError(f"{directory} was written with another configuration: {said}; nothing was restored.")
    check_samples(file, base_samples(model, name))
    fit = checkpoint.compare(file, model.adapter_state_dict(name), model)
    checkpoint.check_strict(file, fit, strict=True)
    return checkpoint.read_tensors(file, fit)


def _check_active(model: AdaptedModel, directory: Path) -> None:
    """Refuse to go on with other active adapters: the optimizer's state belongs to those that trained."""
    path = directory / TRAINER_STATE
    record = json.loads(path.read_text("utf-8")).get("stateful_callbacks", {}) if path.exists() else {}
    active = record.get(RECORD, {}).get("attributes", {}).get("active_adapters")
    if active is None or not set(active) <= model.adapter_configs.keys():
        return  # unknown, or refused with better words when the adapters are restored
    if active != model.active_adapters:
        raise CheckpointError(
            f"{directory}: {shown(active)} was active there, and here it is {shown(model.active_adapters)}; "
            f"call model.set_adapter({active}) first."
        )


__all__ = ["AdapterTrainer", "AdapterTrainerMixin", "restore_adapters"]
