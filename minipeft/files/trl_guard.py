"""Stopping TRL's trainers before they train an adapted model beside a second base, or on packed texts that it mixes.

TRL's DPO, KTO, GRPO and RLOO take the adapter as it is for their reference if the model is a `peft.PeftModel`. For any other
model they load the base again: twice the memory, and the wrong reference where the adapter had been trained before. They
read the model's ``dtype`` just before, to load the copy in it. Other trainers copy the model, or get a reference from the
user; what they have is seen when they tag the model, at the end of their ``__init__``. So is a model that lets packed texts
attend to each other, which TRL only warns of, whatever the model.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.ecosystem.packages import is_from
from minipeft.errors import StateError
from minipeft.files.trainer_guard import callers
from minipeft.kernels.packed_documents import rounding_leak

# Methods of trainers in which they load the base again; the second is that of SDPO and SDFT, for their teacher.
LOADING = ("__init__", "_setup_teacher_model")


class _Dtype:
    """``dtype`` of the plain class, once its reader is checked. Not a property, so that an object's own ``dtype`` comes first."""

    def __get__(self, model: nn.Module | None, owner: type) -> Any:
        if model is None:
            return self
        if not torch.compiler.is_compiling():
            _check_reader(model)
        return super(TrainedAlone, model).dtype  # type: ignore[misc]


class TrainedAlone(nn.Module):
    """The part of `minipeft.AdaptedModel` that TRL's trainers meet."""

    dtype = _Dtype()

    def add_model_tags(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' method, which TRL's trainers call when they have what they will train with.

        Raises:
            StateError: such a trainer has a reference model besides this one, packs texts that this one would mix, or has
                vLLM generate.
        """
        for trainer in callers("__init__"):
            if is_from(type(trainer), "trl"):
                _check_reference(trainer)
                _check_generation(trainer, self)
                _check_packing(trainer, self)
        parent: Any = super()
        return parent.add_model_tags(*args, **kwargs)


def _check_reference(trainer: Any) -> None:
    reference = getattr(trainer, "ref_model", None)
    if isinstance(reference, nn.Module):
        is_copy = any(isinstance(module, TrainedAlone) for module in reference.modules())
        raise StateError(_copied(trainer) if is_copy else _second(trainer))


def _check_generation(trainer: Any, model: nn.Module) -> None:
    """Raise StateError if vLLM is to get this model's parameters: trainers merge them for it in PEFT's models alone."""
    if getattr(trainer, "use_vllm", False) and trainer.model is model:
        raise StateError(
            f"{type(trainer).__name__} would send vLLM the base and the adapters by themselves, which vLLM does not know. "
            f"{_inside(trainer)}"
        )


def _check_packing(trainer: Any, model: nn.Module) -> None:
    """Raise StateError if one text in a row packed by the trainer changes the logits of the next."""
    made_by = getattr(trainer, "data_collator", None)
    if not getattr(trainer, "padding_free", False) or not is_from(type(made_by), "trl") or trainer.is_deepspeed_enabled:
        return
    was_training = model.training
    model.eval()
    try:
        some, others = (_logits_of_the_second(trainer, model, start) for start in (5, 15))
    finally:
        model.train(was_training)
    leak = float((some - others).abs().max() / some.abs().max())
    if leak > rounding_leak(some.dtype):
        raise StateError(
            f"{type(model).__name__} lets packed texts attend to each other (one changes the logits of the next by {leak:.1e} of "
            "the largest). Train it with packing=False and padding_free=False."
        )


@torch.no_grad()
def _logits_of_the_second(trainer: Any, model: nn.Module, start: int) -> Tensor:
    """The logits of the second of two packed texts, which is always the same; `start` says what the first one is."""
    ids = [*range(start, start + 5), *range(30, 37)]
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": [5, 7]}])
    device = next(model.parameters()).device
    given = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items() if name != "labels"}
    logits: Tensor = model(**given, use_cache=False).logits
    return logits[0, 5:]


def _check_reader(model: nn.Module) -> None:
    """Raise StateError if the ``__init__`` of a TRL trainer reads the dtype."""
    here = inspect.currentframe()
    reader = here.f_back.f_back if here is not None and here.f_back is not None else None
    if reader is None or reader.f_code.co_name not in LOADING:
        return
    trainer = reader.f_locals.get("self")
    if is_from(type(trainer), "trl") and getattr(trainer, "model", None) is model:
        raise StateError(_second(trainer))


def _second(trainer: object) -> str:
    return (
        f"{type(trainer).__name__} would hold a second base as its reference, which is not needed: the reference is the adapter "
        f"as it is now. Leave ref_model out. {_inside(trainer)}"
    )


def _inside(trainer: object) -> str:
    return (
        "Pass model=minipeft.integrations.peft.as_peft_model(model) or use minipeft.hf's mixin, class "
        f"MyTrainer(AdapterTrainerMixin, {type(trainer).__name__})."
    )


def _copied(trainer: object) -> str:
    return (
        f"{type(trainer).__name__} copies the model, base and all, for its reference. Give it the plain base and "
        "peft_config=minipeft.integrations.peft.config(LoraConfig(...)), so that PEFT adapts it, or use DPOTrainer."
    )
