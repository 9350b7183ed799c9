"""Computing a model's loss in chunks: the output head passes its input through, and the loss applies the head.

Every causal language model of transformers calls its head and then ``self.loss_function``. In a training call with
labels the head returns its input, so the loss function, which knows the head, receives hidden states instead of
logits. If the model changes the tensor in between (a soft cap, a scale), the call is refused.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.ecosystem.transformers_model import CACHES, output_head
from minipeft.errors import LeanError
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.wrapper import innermost
from minipeft.kernels import glibc
from minipeft.kernels.chunked_cross_entropy import causal_lm_loss
from minipeft.kernels.functional import whole
from minipeft.kernels.transformed import is_compiled, is_transformed
from minipeft.layers.base import layer_ops
from minipeft.layers.quantized import QuantizedLinearOps
from minipeft.python.class_swap import SameFunction, plain_class

_log = logging.getLogger("minipeft")


class PassesThrough(SameFunction):
    """An output head that returns its input while its model's loss is computed in chunks."""

    passing: Passing | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.passing is not None:
            self.passing.hidden, self.passing.version = hidden, 0 if is_compiled() else hidden._version
            return hidden
        return super().forward(hidden)


@dataclass
class Passing:
    """What the head passes to the loss within one call of the model."""

    hidden: Tensor | None = None
    version: int = 0
    used: bool = False


@dataclass(eq=False)
class LeanLoss:
    """Replaces a model's loss function. Plain data, so copies and pickles of the model carry it."""

    head: nn.Module
    original: Any
    set_before: bool
    takes_use_cache: bool
    trims: bool  # whether freed memory goes back to the system around it, which takes time
    left_alone: bool = False  # and that has been logged
    took_logits: bool = False  # from the outputs of the last call

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The loss: in chunks if the head passed its input through, else the model's own."""
        passing: Passing | None = getattr(self.head, "passing", None)
        if passing is None:
            return self.original(logits, labels, *args, **kwargs)
        self._check_untouched(passing, logits)
        passing.used = True
        base: Any = innermost(self.head)
        bias = None if base.bias is None else whole(base.bias)
        rows = _changed_rows(self.head)
        changed = (torch.cat([i for i, _ in rows]), torch.cat([change for _, change in rows])) if rows else None
        known = {
            name: kwargs[name] for name in ("num_items_in_batch", "ignore_index", "shift_labels") if name in kwargs
        }
        self.trim(logits)
        loss = causal_lm_loss(logits, whole(base.weight), bias, labels, changed_rows=changed, **known)
        self.trim(logits)  # just before the step's peak of memory
        return loss

    def trim(self, tensor: Tensor) -> None:
        """Give freed memory back to the system, if that is wanted and the tensor is on a CPU."""
        if self.trims:
            glibc.trim(tensor.device.type)

    def _check_untouched(self, passing: Passing, logits: Tensor) -> None:
        hidden = passing.hidden
        if is_compiled():  # which has neither addresses nor versions
            same = hidden is logits
        else:
            same = (
                hidden is not None
                and hidden.data_ptr() == logits.data_ptr()
                and hidden.shape == logits.shape
                and hidden.dtype == logits.dtype
                and logits._version == passing.version
            )
        if not same:
            raise LeanError(
                "the model changes its logits between the head and the loss (a soft cap, a scale, a slice or a cast); "
                "pass chunked_loss=False."
            )


def check_loss(model: nn.Module) -> None:
    """Raise LeanError if a model's loss cannot be computed in chunks."""
    why = _why_whole(model)
    if why is not None:
        raise LeanError(
            f"{type(model).__name__}: the loss cannot be computed in chunks, since {why}; pass chunked_loss=False."
        )


def _why_whole(model: nn.Module) -> str | None:
    """Why a model's loss needs all logits at once, if it does."""
    head, loss = output_head(model), getattr(model, "loss_function", None)
    if head is None:
        return "it has no output head"
    if _changed_rows(head) is None:
        return "its output head is adapted"
    if plain_class(type(head.base_layer if isinstance(head, AdaptedLayer) else head)) is not nn.Linear:
        return "its output head is not a plain linear layer"
    if isinstance(layer_ops(innermost(head)), QuantizedLinearOps):
        return "its output head is quantized"
    if not _is_frozen(head):
        return "its output head trains"
    if getattr(loss, "__name__", "") != "ForCausalLMLoss":
        return "its loss is not transformers' ForCausalLMLoss"
    if any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in (head, innermost(head))):
        return "its output head is patched or hooked"
    return None


def before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Pre-hook of the model: decides whether this call's loss is computed in chunks. An export has the whole logits."""
    loss: LeanLoss = model._loss_function  # type: ignore[assignment]
    loss.took_logits = False
    if getattr(loss.head, "passing", None) is not None:  # torch calls no hook after a call that Ctrl-C has ended
        loss.head.passing = None  # type: ignore[assignment]
    if not (model.training and torch.is_grad_enabled()):
        return None
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
    if given.get("labels") is None and kwargs.get("shift_labels") is None:
        return None
    if (is_compiled() or not is_transformed()) and _still_fits(model, loss.head):
        loss.trim(next(model.parameters()))
        loss.head.passing = Passing()  # type: ignore[assignment]
    # A training step does not read the cache, which would copy all keys and values.
    free = given.get("use_cache") is None and ("use_cache" in kwargs or "use_cache" not in given)
    if loss.takes_use_cache and free and all(given.get(name) is None for name in CACHES):
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


def _still_fits(model: nn.Module, head: nn.Module) -> bool:
    """False for a head that trains by now, or whose adapter does more than change rows: it needs whole logits."""
    same = model.get_output_embeddings() is head and isinstance(head, PassesThrough)  # type: ignore[operator]
    return same and _is_frozen(head) and _changed_rows(head) is not None


def _is_frozen(head: nn.Module) -> bool:
    """Whether nothing but adapters trains in the head."""
    base = getattr(head, "base_layer", head)
    return not any(p.requires_grad for p in base.parameters())


def _changed_rows(head: nn.Module) -> list[tuple[Tensor, Tensor]] | None:
    """What adapters add to rows of the head's weight: [] if it is not adapted, None if they do more than that."""
    adapted = getattr(head, "changed_rows", None)
    return adapted() if callable(adapted) else []


def after_forward(model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Hook of the model: removes the hidden states that stand in the place of logits in its output."""
    loss: LeanLoss = model._loss_function  # type: ignore[assignment]
    passing: Passing | None = getattr(loss.head, "passing", None)
    if passing is None:
        return None
    loss.head.passing = None  # type: ignore[assignment]
    if output is None:  # the call failed
        return None
    if passing.hidden is None:  # the head was not called: TRL multiplies by its weight itself, in chunks of its own
        if not loss.left_alone:
            loss.left_alone = True
            _log.info(
                "lean: %s was not asked for its logits, so its loss is left to the code that called it.",
                type(model).__name__,
            )
        return None
    if not passing.used:
        raise LeanError(f"{type(model).__name__} did not compute its loss by loss_function; pass chunked_loss=False.")
    loss.took_logits = True
    if isinstance(output, tuple):
        return (output[0], None, *output[2:])
    return type(output)(**{**output, "logits": None})


def took_logits(model: nn.Module) -> bool:
    """Whether the last call of a lean model gave a loss without logits."""
    losses = (module.__dict__.get("_loss_function") for module in model.modules())
    return any(isinstance(loss, LeanLoss) and loss.took_logits for loss in losses)
