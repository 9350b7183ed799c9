"""q, k and v of litgpt, which are one layer there, as the one layer or the three that transformers has."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minipeft.errors import CheckpointError, told
from minipeft.files.formats.foreign import Module, Source
from minipeft.files.formats.litgpt_families import Family
from minipeft.files.tensor_file import Made

LEGACY = "attn.attn"  # the layer's name up to litgpt 0.5.4


@dataclass(frozen=True)
class Heads:
    """The attention's heads."""

    count: int
    groups: int
    size: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """How many rows q, k and v have."""
        return self.count * self.size, self.groups * self.size, self.groups * self.size

    def apart(self) -> tuple[Tensor, ...]:
        """The rows of q, k and v, if all of q come first, then all of k."""
        return torch.split(torch.arange(sum(self.rows), device="cpu"), list(self.rows))

    def by_group(self) -> Tensor:
        """The same rows in the order of a weight that has those of each query group together."""
        return torch.cat([rows.view(self.groups, -1) for rows in self.apart()], 1).flatten()


def qkv_modules(
    source: Source, stem: str, adapted: Sequence[int], heads: Heads, family: Family, r: int, alpha: float
) -> dict[str, Module]:
    """The modules, by the end of transformers' name, that an adapted layer of q, k and v comes to.

    A layer that has rows of several of them gets the A of each, one under the other, and a B with zeros between the
    parts. `adapted` says which of q (0), k (1) and v (2) are.

    Raises:
        CheckpointError: the factors are not those of these options.
    """
    a, b = f"{stem}.lora_A", f"{stem}.lora_B"
    shapes, sizes = [source.file.shapes.get(key, ()) for key in (a, b)], [heads.rows[place] for place in adapted]
    needed = (r * len(adapted), sum(sizes))
    if len(shapes[0]) != 2 or shapes[0][0] != needed[0] or shapes[1] != (needed[1], r):
        raise CheckpointError(
            f"{source.file.path}: {stem} has factors {told([list(s) for s in shapes])}; the two YAML files ask for "
            f"{needed[0]} rows of A and {[needed[1], r]} of B."
        )
    stored = torch.cat([heads.apart()[place] for place in adapted])
    if stem.endswith(LEGACY) and len(adapted) == len(heads.rows):
        # Its weight had each query group together. Where all three are adapted, `zero_pad` leaves B's rows in that order.
        stored = heads.by_group()
    blocks = torch.split(stored, sizes)
    wanted = (
        heads.apart() if len(family.qkv) > 1 else (heads.by_group() if family.by_group else torch.cat(heads.apart()),)
    )
    made = {}
    for name, rows in zip(family.qkv, wanted, strict=True):
        used = [number for number, block in enumerate(blocks) if torch.isin(block, rows).any()]
        if used:
            A = functools.partial(_down, used=used, r=r)
            B = functools.partial(_up, used=used, blocks=blocks, rows=rows)
            shape_A, shape_B = (r * len(used), shapes[0][1]), (len(rows), r * len(used))
            dtypes = source.file.dtypes
            tensors = {"A": Made((a,), shape_A, dtypes[a], A), "B": Made((b,), shape_B, dtypes[b], B)}
            ends: dict[str, str | Made] = {f"lora_{end}.weight": how for end, how in tensors.items()}
            made[name] = Module(ends, r * len(used), alpha * len(used))
    return made


def _down(A: Tensor, used: Sequence[int], r: int) -> Tensor:
    return torch.cat([A[r * number : r * (number + 1)] for number in used])


def _up(B: Tensor, used: Sequence[int], blocks: Sequence[Tensor], rows: Tensor) -> Tensor:
    """The rows of B in the order of `rows`, those of each block in columns of its own."""
    parts = torch.split(B, [len(block) for block in blocks])
    whole = B.new_zeros(len(rows), len(used), B.shape[1])
    for column, number in enumerate(used):
        here = torch.isin(rows, blocks[number])
        place = torch.argsort(blocks[number])[torch.searchsorted(blocks[number].sort().values, rows[here])]
        whole[here, column] = parts[number][place]
    return whole.flatten(1)
