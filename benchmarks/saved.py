"""How many bytes a forward pass keeps for the backward pass: counted, not estimated, and the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(call: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of all distinct storages that autograd saves while `call` runs, without the model's own.

    Args:
        call: a forward pass; what it returns is held until the count is done, so that no storage is used twice.
        model: its parameters and buffers are there anyway and do not count.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that kept its own output through this hook would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    del result
    return sum(sizes.values())
