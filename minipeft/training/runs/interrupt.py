"""SIGTERM: finish the update at hand, save, and go; all processes together."""

from __future__ import annotations

import signal
from types import FrameType

import torch
from torch import distributed as dist

from minipeft.training.distributed.ranks import rank_and_world_size

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that the signal ended


class Interrupt:
    """Notes SIGTERM instead of dying of it, from when it is made until `restore`.

    Only the main thread may make one.
    """

    def __init__(self) -> None:
        self.noted = False
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True

    def came(self, device: torch.device | str = "cpu") -> bool:
        """Whether any process has been asked to stop. Every process calls it, and all get the same answer.

        Args:
            device: where the processes can meet: of the model.
        """
        if rank_and_world_size()[1] == 1:
            return self.noted
        flag = torch.tensor(int(self.noted), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def restore(self) -> None:
        """Let SIGTERM do again what it did before."""
        signal.signal(signal.SIGTERM, self._before)
