"""The processes of a run: their number, sums and values over all of them, and what stops all of them: errors and SIGTERM."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minipeft.errors import CheckpointError, MinipeftError

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that the signal ended


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) if torch.distributed has not been started."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def summed(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The sum of a tensor on the CPU over all processes, in every process, on the CPU; it has one shape everywhere.

    The processes communicate through `device`, that of the model.
    """
    if rank_and_world_size()[1] == 1:
        return tensor
    total = tensor.to(device, copy=True)
    dist.all_reduce(total)
    return total.cpu()


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, in every process; torch pickles them on the way."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [value]
    found = [None] * world_size
    dist.all_gather_object(found, value)
    return found


def agree(error: Exception | None) -> None:
    """Raise in every process if any has an error. Every process calls it.

    Raises:
        Exception: `error`, in the process that has one.
        CheckpointError: another process has one; its message is repeated.
    """
    text = "" if error is None else str(error) if isinstance(error, MinipeftError) else repr(error)
    messages = gather(text)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message:
            raise CheckpointError(f"process {rank} of {len(messages)}: {message}")


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """A block that every process runs; if it raises in any, all raise at its end, see `agree`."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(error)


class Interrupt:
    """Records SIGTERM instead of dying of it, until `restore` is called, so that a run can finish its update and save.

    Only the main thread may make one.
    """

    def __init__(self) -> None:
        self.noted = False
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True

    def came(self, device: torch.device | str = "cpu") -> bool:
        """Whether any process got the signal. Every process calls it, and all get the same answer."""
        return bool(summed(torch.tensor(int(self.noted), device="cpu"), device))

    def restore(self) -> None:
        """Let SIGTERM do what it did before."""
        signal.signal(signal.SIGTERM, self._before)
