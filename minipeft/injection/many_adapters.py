"""Several adapters in one batch: generating with them, training them at once, and the loss of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.errors import ConfigError, StateError, all_or_nothing
from minipeft.injection.attach import train_also
from minipeft.injection.rows import BASE, select, tensor_of
from minipeft.injection.rows_of_call import names_of_rows, rows_acting, rows_of_call
from minipeft.injection.state import WithAdapters, names_given
from minipeft.injection.wrapper import parameters_at


class Generate:
    """The model's own ``generate``, which also takes ``adapter_names``: a name, or ``"__base__"``, for each prompt.

    A model without one has none here, too. It is not a property, so that the Trainer can replace it for FSDP2.
    """

    def __get__(self, model: Any, owner: type) -> Any:
        """The method of a model; read from the class, that of the plain class."""
        if model is None:
            return super(ManyAdapters, owner).generate  # type: ignore[misc]
        return _by_row(model, super(ManyAdapters, model).generate)  # type: ignore[misc]


class ManyAdapters(WithAdapters):
    """The part of `minipeft.AdaptedModel` for batches whose rows use different adapters."""

    generate = Generate()

    @all_or_nothing
    def train_adapters(self, adapter_names: Sequence[str]) -> None:
        """Let the parameters of these adapters require gradients, besides those of the active ones, until the next call.

        They learn from batches with ``adapter_names``. Which adapters act without that does not change. ``[]`` ends it.

        Raises:
            StateError: a name is unknown, or the adapter was made or loaded not to train.
        """
        names = names_given(adapter_names)
        self._check_trainable(names)
        train_also(self, tuple(dict.fromkeys(names)))

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """The parameters that training this adapter changes, each once: for its own optimizer group, or to clip.

        Raises:
            StateError: the name is unknown, or the adapter was made or loaded not to train.
        """
        self._check_trainable((adapter_name,))
        resting = self._state.resting[adapter_name]
        places = [
            place
            for place in self._state.places[adapter_name]
            if place in resting or any(p.requires_grad for p in parameters_at([place]))
        ]
        return list({id(parameter): parameter for parameter in parameters_at(places)}.values())

    def _check_trainable(self, names: Sequence[str]) -> None:
        self._state.check_known(names)
        for name in names:
            if name not in self._state.switch.trainable:
                raise StateError(
                    f"adapter {name!r} was made or loaded not to train; load it with is_trainable=True, or leave "
                    "inference_mode out of its configuration."
                )


def _by_row(model: nn.Module, generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def call(*args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return generate(*args, **kwargs)
        rows = rows_of_call(model, adapter_names, args, kwargs, times=_repeats(model, args, kwargs), keeps=True)
        with rows_acting(model, rows):
            return generate(*args, **kwargs)

    return call


def _repeats(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """How often ``generate`` repeats each row: for its beams, or for several answers to one prompt."""
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    configs = (given, getattr(model, "generation_config", None))

    def option(name: str) -> int:
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), 1)

    return max(option("num_beams"), option("num_return_sequences"))


def per_adapter_loss(
    logits: Tensor, labels: Tensor, adapter_names: Sequence[str], *, ignore_index: int = -100, shift: bool = True
) -> dict[str, Tensor]:
    """The mean cross entropy of each adapter's own tokens, as if it had been trained alone.

    ``sum(per_adapter_loss(...).values()).backward()`` gives each adapter the gradient of its own loss. A loss that is not
    finite stays with its adapter.

    Args:
        logits: shape (rows, length, classes); or (rows, classes), one label a row.
        labels: shape (rows, length), or (rows,).
        adapter_names: as the model was called with; rows with ``"__base__"`` have no loss.
        ignore_index: a label that does not count. With no other label in its rows, an adapter's loss is 0.
        shift: each position predicts the next label, as in a causal language model; False for an encoder-decoder and for
            labels of tokens. One label a row is never shifted.

    Returns:
        The adapters' names, in the order of the rows -> a scalar in float32 at least.

    Raises:
        ConfigError: logits, labels and names do not belong together.
    """
    for name, tensor in (("logits", logits), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"per_adapter_loss: {name} must be a tensor, not {type(tensor).__name__}.")
    count = len(names_of_rows(adapter_names))
    if logits.shape[:-1] != labels.shape or len(labels) != count:
        raise ConfigError(
            f"per_adapter_loss: logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and {count} names must agree on the "
            "rows, and on the length."
        )
    if shift and labels.ndim > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    losses = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]), labels.reshape(-1), ignore_index=ignore_index, reduction="none"
    )
    sums, tokens = losses.view(count, -1).sum(1), (labels != ignore_index).view(count, -1).sum(1)
    found = {}
    for name in dict.fromkeys(adapter_names):
        own = tensor_of([row for row, used in enumerate(adapter_names) if used == name], labels.device)
        if name != BASE:
            found[name] = select(sums, own).sum() / select(tokens, own).sum().clamp_min(1)
    return found
