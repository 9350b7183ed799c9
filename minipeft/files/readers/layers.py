"""What an adapter does to each layer, in figures from its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import CheckpointError
from minipeft.files.readers.contents import Contents
from minipeft.files.readers.facts import rank_in_file
from minipeft.files.readers.plain import Pair, pair_of


@dataclass(frozen=True)
class Layer:
    """One adapted layer; None for what its method or its file does not have."""

    module: str
    rank: int | None
    scaling: float | None
    norm: float  # Frobenius, of what `norm_of` says
    relative: float | None  # over the weight's norm, estimated from samples of the base or from DoRA's magnitudes
    dtype: str  # of its tensors, joined by "+" if they differ
    bytes: int
    norm_of: str  # "update", or "tensors" if the file alone does not give the update

    @property
    def kind(self) -> str:
        """The name with a star for each number in it."""
        return ".".join("*" if word.isdigit() else word for word in self.module.split("."))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        values = asdict(self).items()
        return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in values}


def layers_of_file(contents: Contents, values: Mapping[str, Tensor], samples: Mapping[str, list[float]]) -> list[Layer]:
    """Every adapted layer, in the order of the file. `samples`: of the base's weights by module."""
    made = []
    for module, parts in contents.layers.items():
        tensors = [values[key] for key in parts.values()]
        pair = _pair(contents, module, values)
        norm = update_norm(pair) if pair is not None else _norm(tensors)
        shape = None if pair is None else (pair.up.shape[0], math.prod(pair.down.shape[1:]))
        weight = _weight_norm(shape, samples.get(module), values.get(parts.get("lora_magnitude_vector", "")))
        made.append(
            Layer(
                module=module,
                rank=rank_in_file(contents, module) or _rank(contents, module),
                scaling=pair.scaling if pair is not None else contents.scalings.get(module),
                norm=norm,
                relative=norm / weight if weight and pair is not None else None,
                dtype="+".join(sorted({contents.weights.dtypes[key] for key in parts.values()})),
                bytes=sum(tensor.nbytes for tensor in tensors),
                norm_of="tensors" if pair is None else "update",
            )
        )
    return made


def _pair(contents: Contents, module: str, values: Mapping[str, Tensor]) -> Pair | None:
    """The low-rank part of a layer's update, whatever else the layer trains."""
    if contents.method not in ("LORA", "ADALORA") or contents.config.get("target_parameters"):
        return None
    try:
        return pair_of(contents, module, values)
    except CheckpointError:  # a factor is missing
        return None


def update_norm(pair: Pair) -> float:
    """Frobenius norm of ``scaling * up @ down``, without forming the product."""
    up, down = pair.up.double().flatten(1), pair.down.double().flatten(1)
    squared = ((up.T @ up) * (down @ down.T)).sum()
    return float(abs(pair.scaling) * squared.clamp_min(0).sqrt())


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def _rank(contents: Contents, module: str) -> int | None:
    if contents.method == "VERA" and isinstance(contents.config.get("r"), int):
        return int(contents.config["r"])
    return contents.ranks.get(module) if contents.method in ("LOHA", "LOKR") else None


def _weight_norm(shape: tuple[int, int] | None, sample: list[float] | None, magnitude: Tensor | None) -> float | None:
    if magnitude is not None:
        return float(magnitude.double().norm())
    if shape is None or not sample:
        return None
    return math.sqrt(sum(value * value for value in sample) / len(sample) * math.prod(shape))
