"""Tensors of PEFT's files that say nothing new: copies of base weights, and repeats of other tensors.

An adapter has no place for them. They are compared with what they copy or repeat, and then left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.ecosystem.wrapper_names import PREFIX, ROOT, named_modules, named_parameters
from minipeft.errors import CheckpointError
from minipeft.files.format import AdapterFile
from minipeft.files.peft_extras import TRANSPOSED
from minipeft.layers.offloaded import values_of

# In a state that was saved without PEFT's filter, with or without the adapter's name behind them.
_NAME = r"(\.[A-Za-z0-9_-]{1,64})?"
_PROJECTION = re.compile(r".+\.(vera_[AB])" + _NAME)  # VeRA's shared matrices, again at each layer
_IN_COPY = re.compile(r"\.modules_to_save\.[A-Za-z0-9_-]{1,64}(?=\.)")  # before a bias inside of a trained module
_INFIX = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.)")  # of PEFT's wrappers
_RANK = re.compile(r"(.+\.)ranknum" + _NAME)  # how many triplets of AdaLoRA a layer has


@dataclass(frozen=True)
class ExtraTensors:
    """The tensors of a file that copy or repeat another one, by key."""

    file: AdapterFile
    copies: Mapping[str, Tensor]  # -> the tensor of the base, or what the shapes of the file say
    repeats: Mapping[str, str]  # -> the key of the tensor that it repeats

    def __contains__(self, key: str) -> bool:
        return key in self.copies or key in self.repeats

    @property
    def to_read(self) -> set[str]:
        """The keys of all that `check` compares."""
        return {*self.copies, *self.repeats, *self.repeats.values()}

    def check(self, values: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError if the value of a copy or a repeated tensor differs."""
        for key, parameter in self.copies.items():
            if not torch.allclose(values[key].float(), parameter.detach().float().cpu(), rtol=1e-2, atol=1e-6):
                raise CheckpointError(
                    f"{self.file.path} brings its own {key!r}, which differs from this model's. Use the base it was trained on."
                )
        for key, other in self.repeats.items():
            repeated = values[other].t() if _is_transposed(key, other) else values[other]
            if not torch.equal(values[key], repeated):
                raise CheckpointError(
                    f"{self.file.path}: {key!r} and {other!r} should be equal, and differ. Tied layers have one adapter, or one "
                    "trained copy, here; load it on a base in which they are not tied."
                )


def find_extras(file: AdapterFile, keys: Sequence[str], tied: Mapping[str, str], model: nn.Module) -> ExtraTensors:
    """Which of these keys, for which an adapter of the model has no place, copy or repeat another tensor, by name and shape.

    Args:
        file: unread.
        keys: of it.
        tied: name of a tied layer -> name of the layer whose adapter it shares.
        model: the base.
    """
    repeats = {key: other for key in keys if (other := _repeated(file, key, tied)) is not None}
    repeats |= _second_names(file, [key for key in keys if key not in repeats], keys, model)
    left = [key for key in keys if key not in repeats]
    return ExtraTensors(file, _copies(file, left, model) | _rank_numbers(file, left), repeats)


def _repeated(file: AdapterFile, key: str, tied: Mapping[str, str]) -> str | None:
    """The key of which this one is a repeat; None if it is none.

    PEFT repeats the bias of a trained head, and the tensors of a tied layer. VeRA's matrices are in a state without PEFT's
    filter once more for each layer.
    """
    if match := _PROJECTION.fullmatch(key):
        other = f"{ROOT}{match[1]}"
        if file.shapes.get(other) == file.shapes[key]:
            return other
    name = key.replace(".modules_to_save.", ".")
    other = _untied(name if name in file.shapes else _IN_COPY.sub("", key), tied)
    if other not in file.shapes:  # the factors of a head and of its embedding are each other's transpose
        other = _transposed(other)
    shape = file.shapes[key][::-1] if _is_transposed(key, other) else file.shapes[key]
    return other if other != key and file.shapes.get(other) == shape else None


def _untied(key: str, tied: Mapping[str, str]) -> str:
    """The key of the same tensor in the layer that a tied layer is tied to."""
    plain = key.removeprefix(PREFIX) if tied else ""
    for place, character in enumerate(plain):
        if character == "." and plain[:place] in tied:
            return f"{PREFIX}{tied[plain[:place]]}.{plain[place + 1 :].removeprefix('base_layer.')}"
    return key


def _transposed(key: str) -> str:
    """The key of an embedding's factor whose transpose this factor of a linear layer is, or the key itself."""
    ending = next((ending for ending in TRANSPOSED if key.endswith(ending)), "")
    return key.removesuffix(ending) + TRANSPOSED[ending] if ending else key


def _is_transposed(key: str, other: str) -> bool:
    return other.endswith(tuple(TRANSPOSED.values())) and key.endswith(tuple(TRANSPOSED))


def _second_names(file: AdapterFile, keys: Sequence[str], unknown: Sequence[str], model: nn.Module) -> dict[str, str]:
    """Which of these keys are the second name of a bias that a key of the file, not one of the unknown, names too.

    Not of a weight: where a copy of an embedding trains, PEFT writes the head that was tied to it as the base has it.
    """
    keys = [key for key in keys if key.endswith(".bias")]
    if not keys:
        return {}
    # By their own names alone: a bias of the original in PEFT's wrapper does not repeat the trained one.
    parameters = named_parameters(model, remove_duplicate=False)
    base = {PREFIX + name.replace(".base_layer.", "."): parameter for name, parameter in parameters}
    trained = {key: key.replace(".base_layer.", ".") for key in file.shapes if key not in unknown}
    # Where PEFT leaves the other name the base's.
    copied = tuple(f"{entry}.bias" for entry in file.config.modules_to_save or ())
    known = {id(base[name]): key for key, name in trained.items() if name in base and not name.endswith(copied)}
    found = {key: known[id(base[key])] for key in keys if key in base and id(base[key]) in known}
    return {key: other for key, other in found.items() if file.shapes[key] == file.shapes[other]}


def _copies(file: AdapterFile, keys: Sequence[str], model: nn.Module) -> dict[str, Tensor]:
    """Which of these keys copy a tensor of the base, such as an embedding table -> that tensor."""
    base, plain = _base_tensors(model) if keys else {}, {key: _INFIX.sub("", key) for key in keys}
    found = {key: base[name] for key, name in plain.items() if name in base and base[name].shape == file.shapes[key]}
    return values_of(model, found)


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Base parameters and buffers by the key that PEFT gives them, without the infixes of its wrappers.

    With ``bias="all"`` it writes the buffers called bias, too, which a frozen norm has (DETR's backbone).
    """
    tensors: dict[str, Tensor] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        owner = _INFIX.sub("", f".{name}.").lstrip(".")
        for last, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tensors[f"{PREFIX}{owner}{last}"] = tensor
    return tensors


def _rank_numbers(file: AdapterFile, keys: Sequence[str]) -> dict[str, Tensor]:
    """Which of these keys are AdaLoRA's number of triplets of a layer, which the shape of another tensor says too -> it."""
    matches = {key: match for key in keys if (match := _RANK.fullmatch(key)) and file.shapes[key] == (1,)}
    shapes = {key: file.shapes.get(f"{match[1]}lora_E") for key, match in matches.items()}
    return {key: torch.tensor([float(shape[0])]) for key, shape in shapes.items() if shape}
