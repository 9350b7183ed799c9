"""Stopping those who would train an adapted model against a second copy of its base, before the copy is made.

TRL's DPO, KTO, GRPO and RLOO take the adapter as it is for their reference if the model is a `peft.PeftModel`. For any other
model they load the base again: twice the memory, and the wrong reference where the adapter had been trained before. They
read the model's ``dtype`` just before, to load the copy in it. Other trainers copy the model, or get a reference from the
user; what they have is seen when they tag the model, at the end of their ``__init__``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from minipeft.errors import StateError
from minipeft.files.trainer_guard import callers
from minipeft.type_names import is_from


class _Dtype:
    """The attribute ``dtype`` of the class after ours. Not a property, so that an object's own ``dtype`` comes first."""

    def __get__(self, model: nn.Module | None, owner: type) -> Any:
        if model is None:
            return self
        if not torch.compiler.is_compiling():
            _check_reader(model)
        return super(TrainedAlone, model).dtype  # type: ignore[misc]


class TrainedAlone(nn.Module):
    """The part of `minipeft.AdaptedModel` that keeps trainers from making a second base."""

    dtype = _Dtype()

    def add_model_tags(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' method, which TRL's trainers call when they have what they will train with.

        Raises:
            StateError: such a trainer has a reference model besides this one.
        """
        for trainer in callers("__init__"):
            reference = getattr(trainer, "ref_model", None)
            if is_from(type(trainer), "trl") and isinstance(reference, nn.Module):
                is_copy = any(isinstance(module, TrainedAlone) for module in reference.modules())
                raise StateError(_copied(trainer) if is_copy else _second(trainer))
        parent: Any = super()
        return parent.add_model_tags(*args, **kwargs)


def _check_reader(model: nn.Module) -> None:
    """Raises a `StateError` if a trainer of TRL's reads the dtype while it is being made."""
    here = inspect.currentframe()
    reader = here.f_back.f_back if here is not None and here.f_back is not None else None
    if reader is None or reader.f_code.co_name != "__init__":
        return
    trainer = reader.f_locals.get("self")
    if is_from(type(trainer), "trl") and getattr(trainer, "model", None) is model:
        raise StateError(_second(trainer))


def _second(trainer: object) -> str:
    name = type(trainer).__name__
    return (
        f"{name} would hold a second base as its reference, which is not needed: the reference is the adapter as it is now. "
        "Leave ref_model out, and pass model=minipeft.integrations.peft.as_peft_model(model) or use minipeft.hf's mixin, "
        f"class MyTrainer(AdapterTrainerMixin, {name})."
    )


def _copied(trainer: object) -> str:
    return (
        f"{type(trainer).__name__} copies the model, base and all, for its reference. Give it the plain base and "
        "peft_config=minipeft.integrations.peft.config(LoraConfig(...)), so that PEFT adapts it, or use DPOTrainer."
    )
