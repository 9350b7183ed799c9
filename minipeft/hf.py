"""Adapted models in transformers' Trainer: checkpoints of the adapter alone, exact resuming, the best adapter at the end.

A plain ``Trainer`` trains an adapted model and saves its adapter. It cannot read the adapter back, and it does not give a
method such as AdaLoRA its own loss and the call after each step that it needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minipeft.ecosystem.packages import is_from
from minipeft.errors import LeanError, MinipeftError, StateError, shown
from minipeft.files.restore import restore_adapters
from minipeft.injection import step_hooks
from minipeft.injection.training_guard import check_training
from minipeft.integrations.trainer_checkpoint import RECORD, restore_best, resume, save_schedules, save_whole_adapters
from minipeft.integrations.trl import arguments_for_trl
from minipeft.memory.chunked_loss import took_logits
from minipeft.model import AdaptedModel


class _AfterStep(TrainerCallback):
    """Calls `minipeft.after_step` when the optimizer has stepped and the gradients are still there.

    It also checks that the adapters that learn are in the optimizer, again whenever a callback has chosen others.
    """

    def __init__(self, trainer: AdapterTrainerMixin) -> None:
        self.trainer = trainer
        self.wrapped: tuple[str, ...] = ()  # the adapters that learned when DDP, if any, wrapped the model
        self.checked: tuple[str, ...] = ()

    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.trainer._check_schedule()
        adapted = self.trainer._adapted()
        if adapted is not None and optimizer is not None:
            check_training(adapted, optimizer)
            self.wrapped = self.checked = adapted._state.switch.learning

    def on_step_begin(self, args: Any, *others: Any, optimizer: Any = None, **kwargs: Any) -> None:
        adapted = self.trainer._adapted()
        if adapted is None or optimizer is None or adapted._state.switch.learning == self.checked:
            return
        check_training(adapted, optimizer)
        self.checked = adapted._state.switch.learning
        late = [name for name in self.checked if name not in self.wrapped]
        if late and args.world_size > 1:
            raise StateError(
                f"adapter {shown(late)} did not train when DDP wrapped the model, so its gradients would not be averaged over "
                f"the processes. Call model.train_adapters({late}) before training."
            )

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._after_step()


class AdapterTrainerMixin:
    """Lets a Trainer read adapters back. It comes before the Trainer: ``class MyTrainer(AdapterTrainerMixin, SFTTrainer)``.

    ``train(resume_from_checkpoint=...)`` continues with the values, optimizer, data order and dropout of the interrupted
    run, bit for bit on the same kind of device with as many processes, and refuses a checkpoint of another base, configuration
    or set of adapters.
    ``load_best_model_at_end=True`` restores the best adapter's values. Every checkpoint holds every adapter of the model.
    A model that is not adapted is left to the Trainer.

    In training, `minipeft.extra_loss` is added to the loss once per optimizer step, however many passes are accumulated,
    and `minipeft.after_step` is called after each step. Do not do either yourself.
    """

    restores_adapters: ClassVar[bool] = True
    args: Any
    model: Any
    state: Any
    accelerator: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    is_world_process_zero: Any
    _in_checkpoint = False  # True while a checkpoint to resume from is being written
    _extra_loss_added = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if is_from(type(self), "trl"):
            args, kwargs = (), arguments_for_trl(_after(AdapterTrainerMixin, type(self)), args, kwargs)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.add_callback(_AfterStep(self))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(AdapterTrainerMixin)]:
            if "_load_from_checkpoint" in vars(base) and not issubclass(base, AdapterTrainerMixin):
                raise TypeError(f"{cls.__name__}: AdapterTrainerMixin must come before {base.__name__} to take effect.")

    def _adapted(self) -> AdaptedModel | None:
        """The model if it is adapted and its adapters are ours to restore; FSDP and DeepSpeed have their own checkpoints."""
        return None if self.is_fsdp_enabled or self.is_deepspeed_enabled else self._unwrapped()

    def _unwrapped(self) -> AdaptedModel | None:
        return adapted_part(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _scheduled(self) -> AdaptedModel | None:
        """The model if an adapter that trains needs its own loss or a call after each step."""
        adapted = self._adapted()
        return adapted if adapted is not None and step_hooks.has_schedule(adapted) else None

    def _check_schedule(self) -> None:
        model = self._unwrapped()
        if model is not None:
            step_hooks.refuse_idle_layers(model)
        if model is not None and self._adapted() is None and step_hooks.has_schedule(model):
            raise StateError(
                f"{shown(model.active_adapters)} trains by a schedule of its own, which needs its tensors whole; "
                "use DDP instead of FSDP or DeepSpeed."
            )

    def _after_step(self) -> None:
        model = self._scheduled()
        if model is not None and not self.accelerator.optimizer_step_was_skipped:  # an overflow in float16 skips it
            step_hooks.after_step(model, self.state.global_step)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The Trainer's loss, and in training the adapters' regularisation on top."""
        parent: Any = super()
        result = parent.compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        adapted = self._scheduled() if model.training else None
        if adapted is None:
            return result
        self._extra_loss_added = True
        loss, *outputs = result if return_outputs else (result,)
        loss = loss + step_hooks.extra_loss(adapted).to(loss.device) / self._losses_per_step(num_items_in_batch)
        return (loss, *outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's step, which must call `compute_loss` of this class.

        Raises:
            StateError: it does not, so the adapters' regularisation would be missing.
            LeanError: a loss of your own failed on a lean model, whose outputs have no logits.
        """
        parent: Any = super()
        self._extra_loss_added = False
        try:
            loss = parent.training_step(*args, **kwargs)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, MinipeftError) or not took_logits(self.model):
                raise
            raise LeanError(
                f"{type(self).__name__}: {type(error).__name__} in the loss ({error}); a lean model that is given labels has no "
                "logits in training. If the loss reads them, make the model lean with chunked_loss=False."
            ) from error
        if not self._extra_loss_added and self._scheduled() is not None:
            raise StateError(
                f"{type(self).__name__}.compute_loss leaves out the adapters' own loss; let it call "
                "super().compute_loss(...), which adds it."
            )
        return loss

    def _losses_per_step(self, num_items_in_batch: Any) -> int:
        """How many losses a step's gradient is the plain sum of: 1 if Trainer.training_step takes their mean."""
        trainer: Any = self
        is_share = getattr(trainer, "loss_is_scaled_for_ga", None)
        if is_share is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_share = counted or trainer.compute_loss_func is not None
        return int(trainer.current_gradient_accumulation_steps) if is_share else 1

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        parent: Any = super()
        adapted = self._adapted()
        if adapted is not None:
            attributes = {"active_adapters": adapted.active_adapters, "processes": self.args.world_size}
            self.state.stateful_callbacks[RECORD] = {"args": {}, "attributes": attributes}
        if self.is_fsdp_enabled:
            # To record the best checkpoint, each process of Trainer looks for its folder. A sharded state makes that later, so
            # processes would disagree about the best one, and load parts of different checkpoints at the end.
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            Path(parent._get_output_dir(trial=trial), folder).mkdir(parents=True, exist_ok=True)
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
            save_whole_adapters(adapted, Path(output_dir))
            if not self.args.save_only_model:
                save_schedules(adapted, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        adapted = self._adapted()
        if adapted is None:
            parent._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        else:
            resume(adapted, Path(resume_from_checkpoint), self.args.world_size)

    def _load_best_model(self) -> None:
        parent: Any = super()
        adapted = self._adapted()
        if adapted is None:
            parent._load_best_model()
        else:
            restore_best(adapted, Path(self.state.best_model_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own card, marked as an adapter's, so that the hub shows how to load it."""
        parent: Any = super()
        parent.create_model_card(*args, **kwargs)
        adapted = self._adapted()
        if adapted is not None and self.is_world_process_zero():
            adapted.create_or_update_model_card(self.args.output_dir)


def adapted_part(model: nn.Module) -> AdaptedModel | None:
    """The adapted model that this is or holds, as sentence-transformers' models and PEFT's do; None if there is none.

    Raises:
        StateError: something else in it trains, too, or there are several: a checkpoint of one adapter would not hold them.
    """
    if isinstance(model, AdaptedModel):
        return model
    parts = [module for module in model.modules() if isinstance(module, AdaptedModel)]
    if not parts:
        return None
    own = {id(parameter) for parameter in parts[0].parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if len(parts) > 1 or others:
        raise StateError(
            f"{type(model).__name__} trains {shown(others or ['several adapted models'])} besides its adapted part, and a "
            "checkpoint holds one adapted model's adapters alone. Freeze the rest, or save it yourself."
        )
    return parts[0]


def _after(mixin: type, cls: type) -> type:
    """The class whose ``__init__`` is next after a mixin's."""
    rest = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    return next(base for base in rest if "__init__" in vars(base))


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """transformers' Trainer for adapted models; see `AdapterTrainerMixin`."""


__all__ = ["AdapterTrainer", "AdapterTrainerMixin", "restore_adapters"]
