"""SIGTERM: finish the current update, save, and exit; all processes together."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from minipeft.training.distributed.ranks import summed

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that the signal ended


class Interrupt:
    """Records SIGTERM instead of dying of it, until `restore` is called. Only the main thread may make one."""

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
