"""Adapted models in transformers' Trainer: checkpoints of the adapter alone, exact resuming, the best adapter at the end.

A plain ``Trainer`` trains an adapted model and saves its adapter; what it cannot do is read the adapter back, and give a
method such as AdaLoRA the loss of its own and the call after each step that it asks for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback

from minipeft import step_hooks
from minipeft.config import config_from_dict
from minipeft.errors import CheckpointError, StateError, all_or_nothing, shown
from minipeft.files.atomic import write_files
from minipeft.files.base_samples import base_samples, check_samples
from minipeft.files.format import CONFIG_FILE, PROVENANCE, WEIGHTS_FILE, open_adapter
from minipeft.files.load import check_strict, compare, read_tensors
from minipeft.files.save import file_config
from minipeft.files.save_pretrained import DEFAULT, directory_of
from minipeft.model import AdaptedModel

RECORD = "minipeft"  # our place in trainer_state.json, among the states of callbacks
TRAINER_STATE = "trainer_state.json"
SCHEDULE_FILE = "adapter_schedule.safetensors"
Schedules = Mapping[str, Mapping[str, Tensor] | None]  # by adapter, see `step_hooks.schedule_state`


class _AfterStep(TrainerCallback):
    """Calls `minipeft.after_step` where the optimizer has stepped and the gradients are still there."""

    def __init__(self, trainer: AdapterTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._check_schedule()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._after_step()


class AdapterTrainerMixin:
    """Lets a Trainer read adapters back; stands before it: ``class MyTrainer(AdapterTrainerMixin, SFTTrainer)``.

    ``train(resume_from_checkpoint=...)`` goes on with the values, optimizer, data order and dropout of the interrupted
    run, bit for bit on one kind of device, and refuses a checkpoint of another base, configuration or set of adapters.
    ``load_best_model_at_end=True`` puts the best adapter's values back. Every adapter of the model is in every
    checkpoint. A model that is not adapted is the Trainer's own business.

    What `minipeft.extra_loss` gives is added to the loss in training, once an optimizer step however many passes add
    up to it, and `minipeft.after_step` is called after each; so do neither yourself.
    """

    restores_adapters: ClassVar[bool] = True
    args: Any
    model: Any
    state: Any
    accelerator: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    is_world_process_zero: Any
    _in_checkpoint = False  # while a checkpoint is written, to go on from
    _extra_loss_added = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.add_callback(_AfterStep(self))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(AdapterTrainerMixin)]:
            if "_load_from_checkpoint" in vars(base) and not issubclass(base, AdapterTrainerMixin):
                raise TypeError(
                    f"{cls.__name__}: AdapterTrainerMixin must stand before {base.__name__} to take effect."
                )

    def _adapted(self) -> AdaptedModel | None:
        """The model, where its adapters are ours to restore; FSDP and DeepSpeed have checkpoints of their own."""
        return None if self.is_fsdp_enabled or self.is_deepspeed_enabled else self._unwrapped()

    def _unwrapped(self) -> AdaptedModel | None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model if isinstance(model, AdaptedModel) else None

    # ------------------------------------------------------------------------------------------------------- training
    def _scheduled(self) -> AdaptedModel | None:
        """The model, where an adapter in training asks for a loss of its own, or for a call after each step."""
        adapted = self._adapted()
        return adapted if adapted is not None and step_hooks.has_schedule(adapted) else None

    def _check_schedule(self) -> None:
        model = self._unwrapped()
        if model is not None and self._adapted() is None and step_hooks.has_schedule(model):
            raise StateError(
                f"{shown(model.active_adapters)} trains by a schedule of its own, which needs its tensors whole; "
                "use DDP instead of FSDP or DeepSpeed."
            )

    def _after_step(self) -> None:
        model = self._scheduled()
        if model is not None and not self.accelerator.optimizer_step_was_skipped:  # as after an overflow in float16
            step_hooks.after_step(model, self.state.global_step)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The Trainer's own, and in training the adapters' regularisation on top."""
        parent: Any = super()
        result = parent.compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        adapted = self._scheduled() if model.training else None
        if adapted is None:
            return result
        self._extra_loss_added = True
        loss, *outputs = result if return_outputs else (result,)
        loss = loss + step_hooks.extra_loss(adapted).to(loss.device) / self._losses_to_a_step(num_items_in_batch)
        return (loss, *outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, which must have come to `compute_loss` here.

        Raises:
            StateError: it has not, so that the adapters' regularisation would be missing.
        """
        parent: Any = super()
        self._extra_loss_added = False
        loss = parent.training_step(*args, **kwargs)
        if not self._extra_loss_added and self._scheduled() is not None:
            raise StateError(
                f"{type(self).__name__}.compute_loss leaves out the adapters' own loss; let it call "
                "super().compute_loss(...), which adds it."
            )
        return loss

    def _losses_to_a_step(self, num_items_in_batch: Any) -> int:
        """Of how many losses a step's gradient is the plain sum: one, where Trainer.training_step takes their mean."""
        trainer: Any = self
        is_share = getattr(trainer, "loss_is_scaled_for_ga", None)
        if is_share is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_share = counted or trainer.compute_loss_func is not None
        return int(trainer.current_gradient_accumulation_steps) if is_share else 1

    # -------------------------------------------------------------------------------------------------------- checkpoints
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        parent: Any = super()
        adapted = self._adapted()
        if adapted is not None:
            attributes = {"active_adapters": adapted.active_adapters}
            self.state.stateful_callbacks[RECORD] = {"args": {}, "attributes": attributes}
        self._in_checkpoint = True
        try:
            parent._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        parent: Any = super()
        parent._save(output_dir, state_dict)
        adapted = self._adapted()
        if self._in_checkpoint and adapted is not None and output_dir is not None:
            _save_to_go_on(adapted, Path(output_dir), with_schedule=not self.args.save_only_model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        parent: Any = super()
        adapted = self._adapted()
        if adapted is None:
            parent._load_from_checkpoint(resume_from_checkpoint, model)
            return
        _check_active(adapted, Path(resume_from_checkpoint))
        schedules = _read_schedules(adapted, Path(resume_from_checkpoint))
        restore_adapters(adapted, resume_from_checkpoint)
        _load_schedules(adapted, schedules)

    def _load_best_model(self) -> None:
        parent: Any = super()
        adapted = self._adapted()
        if adapted is None:
            parent._load_best_model()
            return
        best = Path(self.state.best_model_checkpoint)
        schedules = _read_schedules(adapted, best) if (best / SCHEDULE_FILE).exists() else {}
        restore_adapters(adapted, best)
        _load_schedules(adapted, schedules)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own card, marked as an adapter's, so that the hub shows how to load one."""
        parent: Any = super()
        parent.create_model_card(*args, **kwargs)
        adapted = self._adapted()
        if adapted is not None and self.is_world_process_zero():
            adapted.create_or_update_model_card(self.args.output_dir)


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """transformers' Trainer for adapted models; see `AdapterTrainerMixin`."""


@all_or_nothing
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
            f"{root} holds the adapters {shown(sorted(found))}, and the model has {shown(sorted(wanted))}."
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
    here = config_from_dict(file_config(model, model.adapter_configs[name], name, compact=False)).to_dict()
    there = file.config.to_dict()
    differ = [key for key in here if key not in PROVENANCE and here[key] != there.get(key)]
    if differ:
        said = "; ".join(f"{key} is {there.get(key)!r:.100} there and {here[key]!r:.100} here" for key in differ[:3])
        raise CheckpointError(f"{directory} was written with another configuration: {said}.")
    check_samples(file, base_samples(model, name))
    fit = compare(file, model.adapter_state_dict(name), model)
    check_strict(file, fit, strict=True)
    return read_tensors(file, fit)


def _save_to_go_on(model: AdaptedModel, root: Path, with_schedule: bool) -> None:
    """Save again what `save_pretrained` has left out as of no more use; and the state of the schedules."""
    for name, config in model.adapter_configs.items():
        whole = file_config(model, config, name, compact=False)
        if whole != file_config(model, config, name):
            model._write_adapter(directory_of(root, name), name, model.adapter_state_dict(name), whole)
    if with_schedule and any(step_hooks.keeps_state(model, name) for name in model.adapter_configs):
        states = {name: step_hooks.schedule_state(model, name) for name in model.adapter_configs}
        found = {
            f"{name}/{key}": t.detach().cpu().contiguous() for name, part in states.items() for key, t in part.items()
        }
        write_files(root, {SCHEDULE_FILE: safetensors.torch.save(found)})


def _read_schedules(model: AdaptedModel, root: Path) -> Schedules:
    """The state of each adapter's schedule in a checkpoint, seen to fit; None where there is none."""
    path = root / SCHEDULE_FILE
    states: dict[str, dict[str, Tensor] | None] = dict.fromkeys(model.adapter_configs)
    try:
        if path.exists():
            found = safetensors.torch.load(path.read_bytes())
            for name in states:
                prefix = f"{name}/"
                states[name] = {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix)}
        for name, state in states.items():
            step_hooks.check_schedule_state(model, name, state)
    except (CheckpointError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not what this run can go on from: {error}") from None
    return states


def _load_schedules(model: AdaptedModel, schedules: Schedules) -> None:
    for name, state in schedules.items():
        step_hooks.load_schedule_state(model, name, state)


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
