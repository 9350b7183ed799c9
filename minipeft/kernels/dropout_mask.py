"""A dropout mask that is regenerated from its seed instead of stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minipeft.kernels import matmul

# Rows per seed: fixed, since the backward pass must draw what the forward pass drew. On a GPU each block takes calls of its own.
ROWS = {"cpu": 512, "cuda": 4096}


class DropoutMask:
    """Which features of which rows survive; survivors are multiplied by `scale`.

    On a CPU, where drawing takes long, a feature is dropped if a random byte is below its row's threshold. The threshold is
    one of two neighbouring bytes, drawn so that the probability is met on average.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.scale = 1 / (1 - probability)
        self.seed = int(torch.randint(2**62, (), device="cpu"))  # a GPU's would have to be waited for

    def blocks(self, rows: Tensor, first: int = 0) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The rows a block at a time, in a buffer that the next block overwrites.

        Args:
            rows: shape (rows, features), a part of the input.
            first: index of its first row in the input, a multiple of `rows_per_seed`.

        Yields:
            (which rows, 1 or 0 per feature, these rows with the dropped features at 0).
        """
        generator, size = torch.Generator(rows.device), rows_per_seed(rows.device)
        buffer = rows.new_empty(min(size, len(rows)), rows.shape[1])
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            generator.manual_seed(self.seed + first + start)
            drawn = self._of_bytes if rows.device.type == "cpu" else self._at_once
            survives = drawn(some, generator)
            yield slice(start, start + len(some)), survives, torch.mul(some, survives, out=buffer[: len(some)])

    def _of_bytes(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        low = int(self.probability * 256)
        words = torch.empty((rows.numel() + 7) // 8, dtype=torch.int64, device=rows.device)
        words.random_(-(2**63), None, generator=generator)
        above = torch.empty(len(rows), 1, device=rows.device).uniform_(generator=generator)
        thresholds = above.lt_(self.probability * 256 - low).add_(low - 128)
        thresholds = thresholds.to(torch.int8 if low < 255 else torch.int16)
        return words.view(torch.int8)[: rows.numel()].view(rows.shape).ge_(thresholds)

    def _at_once(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        survives = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        return survives.bernoulli_(1 - self.probability, generator=generator)


def rows_per_seed(device: torch.device) -> int:
    """How many rows one seed is for."""
    return ROWS.get(device.type, ROWS["cuda"])


def project_down(rows: Tensor, lora_A: Tensor, mask: DropoutMask | None) -> Tensor:
    """``drop(x) A^T``, shape (rows, r), for x of shape (rows, in) and A of shape (r, in)."""
    if mask is None:
        return matmul.narrow(rows, lora_A.t())
    parts = [matmul.narrow(dropped, lora_A.t()) for _, _, dropped in mask.blocks(rows)]
    h = parts[0] if len(parts) == 1 else torch.cat([rows.new_empty(0, len(lora_A)), *parts])
    return h.mul_(mask.scale)
