"""Whether rows come before positions in the layers' inputs, for a batch with as many of the ones as of the others.

XLNet and torch's own transformer layers put positions first. Elsewhere the shape of an input shows that. Here one row is
run alone, once for each model: then the dimension of the rows is the one of size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from minipeft.errors import StateError
from minipeft.injection.module_tree import wrappers
from minipeft.injection.rows import Rows, acting

BY_POSITION = {"cache_position"}  # arguments of transformers' models without a dimension of rows
CACHES = ("past_key_values", "cache_params")


def learn_order(
    model: nn.Module, rows: Rows, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Mark the layers that are called with positions before rows.

    Args:
        model: the adapted model.
        rows: of the batch, as many as it has positions.
        call: the model's own call.
        args, kwargs: of the call.

    Raises:
        StateError: one row alone cannot be run.
    """
    count, seen = len(rows.names), []

    def first(tensor: Tensor) -> Tensor:
        return tensor[:1] if tensor.ndim and tensor.shape[0] == count else tensor

    def note(wrapper: Any, given: tuple[Any, ...]) -> None:
        x = given[0] if given else None
        if isinstance(x, Tensor) and x.ndim > int(x.is_floating_point()) + 1 and x.shape[0] == count:
            seen.append(wrapper)

    one = {
        name: value if name in BY_POSITION else tree_map_only(Tensor, first, value) for name, value in kwargs.items()
    }
    for name in CACHES:
        if one.pop(name, None) is not None:
            one["use_cache"] = False
    hooks = [wrapper.register_forward_pre_hook(note) for _, wrapper in wrappers(model)]
    try:
        with torch.no_grad(), torch.random.fork_rng(), acting(None):
            call(*tree_map_only(Tensor, first, tuple(args)), **one)
    except Exception as error:
        raise StateError(
            f"adapter_names: {type(model).__name__} has as many rows as positions here, {count}, and does not run on one row "
            "alone, so it cannot be told which come first in its layers. Pad the batch by one position."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for wrapper in seen:
        wrapper.counts = "positions before rows"
