"""FSDP2 (arXiv:2304.11277): the frozen base and the adapter divided over all processes, block by block."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from minipeft.ecosystem.transformers_model import recomputable_blocks
from minipeft.errors import StateError
from minipeft.files.base_samples import remember_base
from minipeft.training.distributed.ranks import rank_and_world_size


def shard(model: nn.Module, device: torch.device | str) -> None:
    """Shard a model over all processes with torch's ``fully_shard``, in place.

    The unit is a block that transformers marks as recomputable (``GradientCheckpointingLayer``): it is gathered to run
    and released afterwards. Call this before making the optimizer, as it replaces the parameters. Works on a CPU with
    gloo, where accelerate's FSDP2 plugin silently becomes DDP.

    Raises:
        StateError: there is only one process, or the model has no blocks.
    """
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        raise StateError("a model is sharded over several processes, but only one runs; start more.")
    blocks = list(recomputable_blocks(model))
    if not blocks:
        raise StateError(
            f"{type(model).__name__} has no blocks to gather one at a time (transformers' GradientCheckpointingLayer)."
        )
    remember_base(model)
    mesh = init_device_mesh(torch.device(device).type, (world_size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is sharded."""
    return isinstance(model, FSDPModule)
