"""The factors of all experts in two tensors, made of one pair for each layer of each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Where the factors of one layer go in those of all experts."""

    source: str  # key of its factor in the file
    expert: int
    rank: int  # the first of its ranks within the expert; the layers of one expert have theirs one after the other
    row: int = 0  # the first of its output features
    step: int = 1  # from one of them to the next
    factor: float = 1.0  # what its B is multiplied by, to have the scaling of the others


def stacked_A(
    *factors: Tensor, blocks: Sequence[Block], experts: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """lora_A of all experts, shape (experts * r, in), with zeros where an expert has less than r ranks."""
    stacked = torch.zeros(shape, dtype=dtype, device="cpu")
    ranks = shape[0] // experts
    for block, factor in zip(blocks, factors, strict=True):
        start = block.expert * ranks + block.rank
        stacked[start : start + len(factor)] = factor
    return stacked


def stacked_B(
    *factors: Tensor, blocks: Sequence[Block], experts: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """lora_B of all experts, shape (out, r * experts) with the expert's index fastest, as PEFT has it.

    Each layer has its own ranks and output features, so B is block diagonal within an expert: ``B A`` of the whole is that
    of each layer, and nothing between them.
    """
    stacked = torch.zeros(shape, dtype=dtype, device="cpu").view(shape[0], -1, experts)
    for block, factor in zip(blocks, factors, strict=True):
        scaled = factor if block.factor == 1 else factor.double() * block.factor
        rows, ranks = factor.shape
        to = slice(block.row, block.row + rows * block.step, block.step)
        stacked[to, block.rank : block.rank + ranks, block.expert] = scaled.to(dtype)
    return stacked.view(shape)
