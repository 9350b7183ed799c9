"""A dropout mask that is regenerated from its seed instead of stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minipeft.kernels import matmul

# Rows per seed: fixed, since the backward pass must draw what the forward pass drew. On a GPU each block takes a dozen calls.
ROWS = {"cpu": 512, "cuda": 4096}


class DropoutMask:
    """Which features of which rows survive; survivors are multiplied by `scale`.

    A feature is dropped if a random byte is below its row's threshold. The threshold is one of two neighbouring bytes,
    drawn so that the probability is met on average: bytes take half the random numbers that 16 bits would.
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
        low = int(self.probability * 256)
        generator, size = torch.Generator(rows.device), rows_per_seed(rows.device)
        buffer = rows.new_empty(min(size, len(rows)), rows.shape[1])
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            generator.manual_seed(self.seed + first + start)
            words = torch.empty((some.numel() + 7) // 8, dtype=torch.int64, device=rows.device)
            words.random_(-(2**63), None, generator=generator)
            above = torch.empty(len(some), 1, device=rows.device).uniform_(generator=generator)
            thresholds = above.lt_(self.probability * 256 - low).add_(low - 128)
            thresholds = thresholds.to(torch.int8 if low < 255 else torch.int16)
            survives = words.view(torch.int8)[: some.numel()].view(some.shape).ge_(thresholds)
            yield slice(start, start + len(some)), survives, torch.mul(some, survives, out=buffer[: len(some)])


def rows_per_seed(device: torch.device) -> int:
    """How many rows one seed is for."""
    return ROWS.get(device.type, ROWS["cuda"])


def project_down(rows: Tensor, lora_A: Tensor, mask: DropoutMask | None) -> Tensor:
    """``drop(x) A^T``, shape (rows, r), for x of shape (rows, in) and A of shape (r, in)."""
    if mask is None:
        return matmul.narrow(rows, lora_A.t())
    h = rows.new_empty(len(rows), len(lora_A))
    for block, _, dropped in mask.blocks(rows):
        h[block] = matmul.narrow(dropped, lora_A.t())
    return h.mul_(mask.scale)
