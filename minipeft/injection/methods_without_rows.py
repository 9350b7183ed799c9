"""Methods of transformers' models that take any option and would ignore ``adapter_names``: refused with it.

Such as CLIP's ``get_text_features``, which runs a part of the model, and ``generate_batch``, whose passes have the tokens of
all prompts in one dimension and run in a thread of their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from minipeft.errors import StateError
from minipeft.injection.rows import rows_now
from minipeft.injection.state import STATE

BATCH = "generate_batch"  # also what ``generate(cache_implementation="paged")`` calls


def refuse_rows(cls: type[nn.Module]) -> None:
    """Make those of these methods that an adapted class has refuse ``adapter_names``."""
    for name in list(_found(cls)):
        setattr(cls, name, _refusing(name, getattr(cls, name)))


def _found(cls: type[nn.Module]) -> Iterator[str]:
    for name in dir(cls):
        if name.startswith("get_") or name in ("encode", "decode", BATCH):
            method = getattr(cls, name)
            if inspect.isfunction(method) and method.__module__.startswith("transformers."):
                kinds = {parameter.kind for parameter in inspect.signature(method).parameters.values()}
                if inspect.Parameter.VAR_KEYWORD in kinds:
                    yield name


def _refusing(name: str, plain: Any) -> Any:
    instead = (
        "call generate() with them and another cache than 'paged'" if name == BATCH else "call the model with them"
    )

    @functools.wraps(plain)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)
        paged = name == BATCH and state is not None and rows_now(state.switch) is not None
        if state is not None and (paged or kwargs.get("adapter_names") is not None):
            raise StateError(
                f"{name}() cannot use another adapter for each row, as adapter_names asks; {instead}, or set_adapter(name)."
            )
        return plain(self, *args, **kwargs)

    return method
