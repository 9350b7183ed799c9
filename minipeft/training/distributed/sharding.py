"""FSDP2 (arXiv:2304.11277): the frozen base and the adapter divided over all processes, a block at a time."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from minipeft.errors import StateError
from minipeft.files.base_samples import remember_base


def shard(model: nn.Module, device: torch.device | str) -> None:
    """Shard a model over all processes with torch's ``fully_shard``, in place.

    Each block, as transformers marks them for checkpointing, is gathered when it is its turn, and let go after it.
    To be called before the optimizer is made, since the parameters become other ones. Also on a CPU, with gloo.

    Args:
        model: adapted, whole and alike on every process.
        device: of this process.

    Raises:
        StateError: there are not several processes, or the model has no blocks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        raise StateError("a model is sharded over several processes, and this is one; start more.")
    blocks = [m for m in model.modules() if any(c.__name__ == "GradientCheckpointingLayer" for c in type(m).__mro__)]
    if not blocks:
        raise StateError(f"{type(model).__name__} has no blocks that could be gathered one at a time.")
    remember_base(model)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model went through `shard`."""
    return isinstance(model, FSDPModule)
