"""The two factors of one parameter, from the pairs of the layers that it was, with shapes and scalings compared first."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import CheckpointError, printable
from minipeft.files.format import DTYPES, FLOATS, NAMES, AdapterFile
from minipeft.files.names.expert_places import Place
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
class Layer:
    """One layer of the file: its old name, its place today, the keys of its factors, and its LoRA configuration."""

    name: str
    place: Place
    keys: tuple[str, str]
    config: Any


@dataclass(frozen=True)
class FusedPair:
    """The factors of a whole parameter, with the rank of each expert and the alpha that go with them.

    A factor that the file holds as it is needed is its key there.
    """

    factors: tuple[Made | str, Made | str]
    r: int
    lora_alpha: float


def fused_pair(file: AdapterFile, layers: Sequence[Layer], owner: nn.Module) -> FusedPair:
    """The factors of one parameter of `owner`.

    Raises:
        CheckpointError: a shape does not fit, or the ranks differ so much that zeros would fill more than the parameter.
    """
    first, config = layers[0], layers[0].config
    if first.place.expert is None:
        return FusedPair(first.keys, config.r, config.lora_alpha)
    features = _features(owner, first.place)
    for layer in layers:
        _check_shapes(file, layer, features)
    starts, r = _ranks(layers)
    rows, experts = features[1] // first.place.parts, len(_parameter(owner, first.place))
    if r > max(features) and sum(layer.config.r for layer in layers) < r * experts:
        raise CheckpointError(
            f"{file.path}: the experts of {first.place.name} have ranks of up to {r:,}, and not all the same. To be stacked "
            f"they would be filled with zeros, which is done up to {max(features):,}."
        )
    lora_alpha = config.lora_alpha * (math.sqrt(r / config.r) if config.use_rslora else r / config.r)
    first_row, step = (1, first.place.parts) if first.place.alternates else (rows, 1)
    A = tuple(Block(layer.keys[0], _index(layer), start) for layer, start in zip(layers, starts, strict=True))
    B = tuple(
        replace(
            block,
            source=layer.keys[1],
            row=layer.place.part * first_row,
            step=step,
            factor=layer.config.scaling / config.scaling,
        )
        for block, layer in zip(A, layers, strict=True)
    )
    is_scaled = any(block.factor != 1 for block in B)
    dtypes = (_dtype(file, A), torch.promote_types(_dtype(file, B), torch.float32) if is_scaled else _dtype(file, B))
    factors = (
        _made(_stacked_A, A, experts, (experts * r, features[0]), dtypes[0]),
        _made(_stacked_B, B, experts, (features[1], r * experts), dtypes[1]),
    )
    return FusedPair(factors, r, int(lora_alpha) if lora_alpha == int(lora_alpha) else lora_alpha)


def _made(
    function: Callable[..., Tensor], blocks: Sequence[Block], experts: int, shape: tuple[int, int], dtype: torch.dtype
) -> Made:
    stack = functools.partial(function, blocks=blocks, experts=experts, shape=shape, dtype=dtype)
    return Made(tuple(block.source for block in blocks), shape, NAMES[dtype], stack)


def _parameter(owner: nn.Module, place: Place) -> Tensor:
    return getattr(owner, place.parameter)


def _features(owner: nn.Module, place: Place) -> tuple[int, int]:
    """(in, out) of one expert."""
    rows, columns = _parameter(owner, place).shape[1:]
    return (rows, columns) if getattr(owner, "is_transposed", False) else (columns, rows)


def _index(layer: Layer) -> int:
    assert layer.place.expert is not None
    return layer.place.expert


def _check_shapes(file: AdapterFile, layer: Layer, features: tuple[int, int]) -> None:
    r, (inputs, outputs) = layer.config.r, features
    for key, shape in zip(layer.keys, ((r, inputs), (outputs // layer.place.parts, r)), strict=True):
        if file.shapes[key] != shape or DTYPES[file.dtypes[key]] not in FLOATS.values():
            raise CheckpointError(
                f"{file.path} does not fit {layer.place.name}: {printable(key, 200)} is {file.dtypes[key]} "
                f"{list(file.shapes[key])} in the file, and {list(shape)} here. Is it for another base?"
            )


def _ranks(layers: Sequence[Layer]) -> tuple[list[int], int]:
    """For each layer the first of its ranks within its expert, in the order of the parts; and the ranks of an expert."""
    used: dict[int, int] = {}
    starts = dict[str, int]()
    for layer in sorted(layers, key=lambda layer: layer.place.part):
        starts[layer.name] = used.get(_index(layer), 0)
        used[_index(layer)] = starts[layer.name] + layer.config.r
    return [starts[layer.name] for layer in layers], max(used.values())


def _dtype(file: AdapterFile, blocks: Sequence[Block]) -> torch.dtype:
    """The type that holds the values of all sources."""
    return functools.reduce(torch.promote_types, {DTYPES[file.dtypes[block.source]] for block in blocks})


def _stacked_A(
    *factors: Tensor, blocks: Sequence[Block], experts: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """lora_A of all experts, shape (experts * r, in), with zeros where an expert has less than r ranks."""
    stacked = torch.zeros(shape, dtype=dtype, device="cpu")
    ranks = shape[0] // experts
    for block, factor in zip(blocks, factors, strict=True):
        start = block.expert * ranks + block.rank
        stacked[start : start + len(factor)] = factor
    return stacked


def _stacked_B(
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
