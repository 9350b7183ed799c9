"""Several adapters in one batch: generating with them, and training them at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from minipeft.errors import StateError, all_or_nothing
from minipeft.injection.attach import train_also
from minipeft.injection.resting import parameters_at
from minipeft.injection.rows_of_call import rows_acting, rows_of_call
from minipeft.injection.state import STATE, AdapterState, names_given


class Generate:
    """The model's own ``generate``, which also takes ``adapter_names``: a name, or ``"__base__"``, for each prompt.

    A model without one has none here, too. No property, so that the Trainer can put another in its place for FSDP2.
    """

    def __get__(self, model: Any, owner: type) -> Any:
        """Of a model, the method; of its class, that of the plain class."""
        if model is None:
            return super(ManyAdapters, owner).generate  # type: ignore[misc]
        return _by_row(model, super(ManyAdapters, model).generate)  # type: ignore[misc]


class ManyAdapters(nn.Module):
    """The part of `minipeft.AdaptedModel` for batches whose rows use different adapters."""

    generate = Generate()

    @all_or_nothing
    def train_adapters(self, adapter_names: Sequence[str]) -> None:
        """Let the parameters of these adapters require gradients, besides those of the active ones, until the next call.

        They learn from batches with ``adapter_names``. Which adapters act without that does not change. ``[]`` ends it.

        Raises:
            StateError: a name is unknown, or the adapter was made or loaded not to train.
        """
        state: AdapterState = self.__dict__[STATE]
        names = names_given(adapter_names)
        self._check_trainable(names)
        names = tuple(dict.fromkeys(names))
        train_also(self, names)
        assert state.also_trained == names

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """The parameters that training this adapter changes, each once: for its own optimizer group, or to clip.

        Raises:
            StateError: the name is unknown, or the adapter was made or loaded not to train.
        """
        self._check_trainable((adapter_name,))
        state: AdapterState = self.__dict__[STATE]
        resting = state.resting[adapter_name]
        places = [
            place
            for place in state.places[adapter_name]
            if place in resting or any(p.requires_grad for p in parameters_at([place]))
        ]
        return list({id(parameter): parameter for parameter in parameters_at(places)}.values())

    def _check_trainable(self, names: Sequence[str]) -> None:
        state: AdapterState = self.__dict__[STATE]
        state.check_known(names)
        for name in names:
            if name not in state.trainable:
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
