"""The processes of a run: who is the first, what each has, and that all fail where one does."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minipeft.errors import CheckpointError, MinipeftError

MESSAGE_BYTES = 2048


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) where torch.distributed has not been started."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def gather_bytes(mine: Tensor) -> list[Tensor]:
    """The uint8 tensors of all processes, by rank, in every process; they must be of equal length."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [mine]
    # A group that was made for GPUs alone cannot send what is in main memory.
    on_cpu = "cpu:" in str(dist.get_backend_config())
    sent = mine if on_cpu else mine.to(torch.device("cuda", torch.cuda.current_device()))
    found = [torch.empty_like(sent) for _ in range(world_size)]
    dist.all_gather(found, sent)
    return [tensor.cpu() for tensor in found]


def agree(error: Exception | None) -> None:
    """Called by every process: raise this one's error; or, where another has one, say so; else return.

    Raises:
        CheckpointError: another process failed.
        Exception: `error`.
    """
    text = "" if error is None else str(error) if isinstance(error, MinipeftError) else repr(error)
    payload = text.encode("utf-8")[:MESSAGE_BYTES]
    mine = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
    mine[: len(payload)] = torch.tensor(list(payload), dtype=torch.uint8)
    messages = [bytes(found.tolist()).rstrip(b"\0").decode("utf-8", "replace") for found in gather_bytes(mine)]
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message:
            raise CheckpointError(f"process {rank} of {len(messages)}: {message}")
