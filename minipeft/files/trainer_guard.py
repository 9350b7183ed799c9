"""Refusing to save an adapted model in a way that cannot be read back: when it is saved, not when it is read.

Trainer only reads an adapter back if ``isinstance(model, PeftModel)``. For any other model it looks for whole weights, so
``load_best_model_at_end`` fails after the last step or, for an adapter in a sub-directory, keeps the last adapter with a
line in the log. A plain model around an adapted one would save the keys of adapted layers. A model does not know who
saves it, so this looks for them on the call stack.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from minipeft.errors import StateError

TRAINER = "transformers.trainer"
TRAINER_STATE, OPTIMIZER_FILE, RATE_FILE = "trainer_state.json", "optimizer.pt", "scheduler.pt"
SCHEDULE_FILE = "adapter_schedule.safetensors"
logger = logging.getLogger("minipeft")


def check_trainer() -> None:
    """Refuse to save for a plain Trainer that will load the best checkpoint at the end; say that it cannot resume.

    Raises:
        StateError: such a trainer is among the callers.
    """
    for trainer in callers("_save"):
        if _is_plain(trainer) and trainer.args.load_best_model_at_end:
            raise StateError(
                f"{type(trainer).__name__} with load_best_model_at_end cannot read an adapter back, so nothing was saved; "
                "use minipeft.hf.AdapterTrainer, or class MyTrainer(AdapterTrainerMixin, "
                f"{type(trainer).__name__}), or load_best_model_at_end=False."
            )
    for trainer in callers("_save_checkpoint"):
        if _is_plain(trainer):
            _say_no_resume(type(trainer).__name__)


def begin_checkpoint(folder: Path) -> None:
    """If a Trainer saves a checkpoint over an older one, remove what says that the old one is complete, and its states.

    Trainer writes ``trainer_state.json`` last, and so says that the rest belongs together. Of the random states each process
    writes its own, perhaps before this. Only within Trainer's own method: a subclass may save the adapter once more after it.
    """
    if next(callers("_save_checkpoint", TRAINER), None) is not None:
        for name in (TRAINER_STATE, OPTIMIZER_FILE, RATE_FILE, "scaler.pt", SCHEDULE_FILE):
            (folder / name).unlink(missing_ok=True)


def check_outer_save(inner: nn.Module) -> None:
    """Refuse to save a plain model that has this adapted one as a part: its file would have the keys of adapted layers.

    Raises:
        StateError: a caller's ``save_pretrained`` is at work on such a model.
    """
    for outer in callers("save_pretrained"):
        parts = dict(outer.named_modules()) if isinstance(outer, nn.Module) and outer is not inner else {}
        name = next((name for name, part in parts.items() if part is inner), None)
        if name is not None:
            raise StateError(
                f"{type(outer).__name__}.save_pretrained would save the keys of adapted layers, which from_pretrained does "
                f"not know, since {name} is adapted. Save the adapter by model.{name}.save_pretrained(...); for a whole "
                f"model, first model.{name}.merge_and_unload() or unload()."
            )


def callers(method: str, module: str | None = None) -> Iterator[Any]:
    """The objects on the call stack whose method of this name, defined in this module, is running; the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == method and module in (None, frame.f_globals.get("__name__")):
            yield frame.f_locals.get("self")
        frame = frame.f_back


def _is_trainer(caller: Any) -> bool:
    return any((c.__module__, c.__name__) == (TRAINER, "Trainer") for c in type(caller).__mro__)


def _is_plain(trainer: Any) -> bool:
    """Whether this is a Trainer that cannot read an adapter back; FSDP and DeepSpeed have their own checkpoints.

    What it trains may tell it how: a `peft.PeftModel` around our model, with the adapter "default", where Trainer looks.
    """
    if not _is_trainer(trainer) or getattr(trainer, "restores_adapters", False):
        return False
    model = trainer.model
    if getattr(model, "restores_adapters", False) and list(model.active_adapters) == ["default"]:
        return False
    return not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


@functools.cache
def _say_no_resume(trainer: str) -> None:
    logger.warning(
        "%s saves the adapter in its checkpoints, but cannot resume from one. To resume, use minipeft.hf.AdapterTrainer, or "
        "class MyTrainer(AdapterTrainerMixin, %s); both also read these checkpoints.",
        trainer,
        trainer,
    )


def save_base_for_pipeline(model: nn.Module, directory: Path) -> None:
    """If a pipeline is saving this part of it, write the plain part, which its ``from_pretrained`` looks for.

    The adapter is written next to it, for `minipeft.load_adapter` on the part that was read back.

    Raises:
        StateError: the part is a transformers model, which would be loaded together with an adapter next to it.
    """
    if not any(_is_pipeline(caller) for caller in callers("save_pretrained")):
        return
    plain: Any = copy.deepcopy(model)  # the model in use stays adapted
    plain = plain.unload()
    if not type(plain).__module__.startswith("diffusers."):
        raise StateError(
            f"the pipeline would write the adapter of its {type(plain).__name__} and not the weights. Save the adapter with "
            "the part's own save_pretrained, and the pipeline after unload()."
        )
    plain.save_pretrained(directory)
    logger.info("%s: the pipeline is saved with the base; load_adapter reads the adapter from here.", directory)


def _is_pipeline(caller: Any) -> bool:
    return any(
        cls.__name__ == "DiffusionPipeline" and cls.__module__.startswith("diffusers.") for cls in type(caller).__mro__
    )
