"""The two factors of one parameter, from the pairs of the layers that it was, with shapes and scalings compared first."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.options import plain
from minipeft.errors import CheckpointError, printable
from minipeft.files.format import DTYPES, FLOATS, NAMES, AdapterFile
from minipeft.files.names.experts.places import ExpertPlace
from minipeft.files.tensor_file import Entry

FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class OldLayer:
    """A layer of the file that is a part of a parameter in the model."""

    name: str  # in the file
    place: ExpertPlace
    keys: Mapping[str, str]  # of `FACTORS` -> the key of that factor
    config: Any  # of its LoRA


@dataclass(frozen=True)
class FusedPair:
    """The factors of a whole parameter, with the rank of each expert and the alpha that go with them."""

    factors: tuple[Entry, Entry]
    r: int
    lora_alpha: float


def fused_pair(file: AdapterFile, layers: Sequence[OldLayer], owner: nn.Module) -> FusedPair:
    """The factors of one parameter of `owner`.

    Raises:
        CheckpointError: a shape does not fit, or the ranks differ so much that zeros would fill more than the parameter.
    """
    place, config = layers[0].place, layers[0].config
    keys_A, keys_B = ([layer.keys[factor] for layer in layers] for factor in FACTORS)
    if place.expert is None:
        return FusedPair((file.entries[keys_A[0]], file.entries[keys_B[0]]), config.r, config.lora_alpha)
    experts, *sides = getattr(owner, place.parameter).shape
    inputs, outputs = sides if getattr(owner, "is_transposed", False) else sides[::-1]
    for layer in layers:
        _check_shapes(file, layer, inputs, outputs)
    starts, r = _ranks(layers)
    if r > max(sides) and sum(layer.config.r for layer in layers) < r * experts:
        raise CheckpointError(
            f"{file.path}: the experts of {place.name} have ranks of up to {r:,}, and not all the same. To be stacked "
            f"they would be filled with zeros, which is done up to {max(sides):,}."
        )
    lora_alpha = config.lora_alpha * (math.sqrt(r / config.r) if config.use_rslora else r / config.r)
    is_scaled = any(layer.config.scaling != config.scaling for layer in layers)
    dtype_A, dtype_B = _dtype(file, keys_A), _dtype(file, keys_B)
    dtype_B = torch.promote_types(dtype_B, torch.float32) if is_scaled else dtype_B
    A = functools.partial(_stacked_A, layers=layers, starts=starts, shape=(experts, r, inputs), dtype=dtype_A)
    B = functools.partial(_stacked_B, layers=layers, starts=starts, shape=(outputs, r, experts), dtype=dtype_B)
    factors = (
        file.making(A, keys_A, (experts * r, inputs), NAMES[dtype_A]),
        file.making(B, keys_B, (outputs, r * experts), NAMES[dtype_B]),
    )
    return FusedPair(factors, r, plain(lora_alpha))


def _check_shapes(file: AdapterFile, layer: OldLayer, inputs: int, outputs: int) -> None:
    r = layer.config.r
    for factor, shape in zip(FACTORS, ((r, inputs), (outputs // layer.place.parts, r)), strict=True):
        key = layer.keys[factor]
        if file.shapes[key] != shape or DTYPES[file.dtypes[key]] not in FLOATS.values():
            raise CheckpointError(
                f"{file.path} does not fit {layer.place.name}: {printable(key, 200)} is {file.dtypes[key]} "
                f"{list(file.shapes[key])} in the file, and {list(shape)} here. Is it for another base?"
            )


def _ranks(layers: Sequence[OldLayer]) -> tuple[list[int], int]:
    """For each layer the first of its ranks within its expert, in the order of the parts; and the ranks of an expert."""
    used: dict[int | None, int] = {}
    starts: dict[str, int] = {}
    for layer in sorted(layers, key=lambda layer: layer.place.part):
        starts[layer.name] = used.get(layer.place.expert, 0)
        used[layer.place.expert] = starts[layer.name] + layer.config.r
    return [starts[layer.name] for layer in layers], max(used.values())


def _dtype(file: AdapterFile, keys: Sequence[str]) -> torch.dtype:
    """The type that holds the values of all these."""
    return functools.reduce(torch.promote_types, {DTYPES[file.dtypes[key]] for key in keys})


def _stacked_A(
    *factors: Tensor, layers: Sequence[OldLayer], starts: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """lora_A of all experts, shape (experts * r, in), with zeros where an expert has less than r ranks."""
    stacked = torch.zeros(shape, dtype=dtype, device="cpu")
    for factor, layer, start in zip(factors, layers, starts, strict=True):
        stacked[layer.place.expert, start : start + len(factor)] = factor
    return stacked.flatten(0, 1)


def _stacked_B(
    *factors: Tensor, layers: Sequence[OldLayer], starts: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """lora_B of all experts, shape (out, r * experts) with the expert's index fastest, as PEFT has it.

    Each layer has its own ranks and output features, so B is block diagonal within an expert: ``B A`` of the whole is that
    of each layer, and nothing between them. Each has the scaling of the first.
    """
    stacked = torch.zeros(shape, dtype=dtype, device="cpu")
    for factor, layer, start in zip(factors, layers, starts, strict=True):
        scaling = layer.config.scaling / layers[0].config.scaling
        scaled = factor if scaling == 1 else factor.double() * scaling
        ranks = slice(start, start + factor.shape[1])
        stacked[layer.place.rows(shape[0]), ranks, layer.place.expert] = scaled.to(dtype)
    return stacked.flatten(1)
