"""An adapted part of a diffusers pipeline that is saved whole: its base is saved too, or the pipeline could not be read back."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from torch import nn

from minipeft.errors import StateError
from minipeft.files.trainer_guard import callers

logger = logging.getLogger("minipeft")


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
