"""The factors of all experts in two tensors, made of one pair for each layer of each expert, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minipeft.files.tensor_file import Made


@dataclass(frozen=True)
class Block:
    """Where the factors of one layer go in those of all experts."""

    source: str  # key of its factor in the file
    expert: int
    rank: int  # the first of its ranks within the expert; the layers of one expert have theirs one after the other
    row: int = 0  # the first of its output features
    step: int = 1  # from one of them to the next
    factor: float = 1.0  # what its B is multiplied by, to have the scaling of the others


@dataclass(frozen=True)
class _Stacked:
    blocks: tuple[Block, ...]
    experts: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def sources(self) -> list[str]:
        return [block.source for block in self.blocks]


class StackedA(_Stacked):
    """lora_A of all experts, shape (experts * r, in), with zeros where an expert has less than r ranks."""

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        stacked = torch.zeros(self.shape, dtype=self.dtype, device="cpu")
        ranks = self.shape[0] // self.experts
        for block, tensor in zip(self.blocks, tensors, strict=True):
            start = block.expert * ranks + block.rank
            stacked[start : start + len(tensor)] = tensor
        return stacked


class StackedB(_Stacked):
    """lora_B of all experts, shape (out, r * experts) with the expert's index fastest, as PEFT has it.

    Each layer has its own ranks and output features, so B is block diagonal within an expert: ``B A`` of the whole is that
    of each layer, and nothing between them.
    """

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        stacked = torch.zeros(self.shape, dtype=self.dtype, device="cpu").view(self.shape[0], -1, self.experts)
        for block, tensor in zip(self.blocks, tensors, strict=True):
            scaled = tensor if block.factor == 1 else tensor.double() * block.factor
            rows, ranks = tensor.shape
            to = slice(block.row, block.row + rows * block.step, block.step)
            stacked[to, block.rank : block.rank + ranks, block.expert] = scaled.to(self.dtype)
        return stacked.view(self.shape)


@dataclass(frozen=True)
class OfMade:
    """A tensor that is made of tensors which the file holds in another form themselves."""

    last: Made
    parts: tuple[Made | str, ...]  # for each source of `last`: how it is made, or its key in the file

    @property
    def sources(self) -> list[str]:
        return [source for part in self.parts for source in ([part] if isinstance(part, str) else part.sources)]

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        left = iter(tensors)
        return self.last.make(
            [
                next(left) if isinstance(part, str) else part.make([next(left) for _ in part.sources])
                for part in self.parts
            ]
        )
