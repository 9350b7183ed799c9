"""The other way: LoRA of fused experts as one pair for each layer of each expert, which servers and transformers 4 read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.options import plain
from minipeft.config.patterns import by_shorter_key, endings
from minipeft.ecosystem.wrapper_names import PREFIX, nested_names
from minipeft.errors import CheckpointError, printable
from minipeft.files.names.experts.config import PATTERN_TABLES
from minipeft.kernels.functional import split_columns, split_rows

_KEY = re.compile(rf"{re.escape(PREFIX)}(.+?)((?:\.base_layer)*)\.lora_(A|B)\.weight")


def split_experts(
    tensors: Mapping[str, Tensor], config: AdapterConfig, layers: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter with a LoRA for each expert, ``experts.0.gate_proj.lora_A.weight``, and the same update.

    Gate and up of an expert get its A, and each its own rows of B. Ranks that one of them does not use at all, as in a file
    that was made of such pairs, are left out. Exact up to the scaling, which only the new alphas say.

    Args:
        tensors: of a file with fused experts, by key, as minipeft writes them.
        config: LoRA's; ``target_parameters`` tells which parameters were adapted. Of several parameters of one module the
            file has the first one innermost, as `layers` lists them.
        layers: parameter -> the layers that it was made of, such as gate and up, whose output features stand in a row.
            GPT-OSS, where they alternate, cannot be split so.

    Returns:
        Tensors, and the options for a file; which layers are targets is for the caller to say. Both as they were if no
        fused experts are adapted.

    Raises:
        CheckpointError: a parameter is not in `layers`, or the shapes are not those of the ranks in `config`.
    """
    stacks = _stacks(tensors, config.target_parameters or (), layers)
    if not stacks:
        return dict(tensors), config.to_dict()
    fused = {f"{stack.key}{factor}.weight" for stack in stacks for factor in "AB"}
    split = {key: tensor for key, tensor in tensors.items() if key not in fused}
    configs: dict[str, Any] = config.for_modules([stack.name for stack in stacks])
    ranks: dict[str, int] = {}  # by the name of an old layer
    alphas: dict[str, float] = {}
    for stack in stacks:
        own, parts = configs[stack.name], layers[stack.parameter]
        for layer, (A, B) in zip(parts, _pairs(tensors, stack.key, own.r, len(parts)), strict=True):
            for expert, (down, up) in enumerate(zip(A, B, strict=True)):
                old = f"{stack.module}.{expert}.{layer}"
                split[f"{PREFIX}{old}.lora_A.weight"] = down.contiguous()
                split[f"{PREFIX}{old}.lora_B.weight"] = up.contiguous()
                ranks[old], alphas[old] = A.shape[1], _alpha(own, A.shape[1])
    return split, _options(config, stacks, {"r": ranks, "lora_alpha": alphas})


class _Stack(NamedTuple):
    """A fused parameter of a file."""

    module: str
    parameter: str
    key: str  # of its pair, up to ``lora_``

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}"


def _stacks(tensors: Mapping[str, Tensor], targets: Sequence[str], layers: Mapping[str, Sequence[str]]) -> list[_Stack]:
    """The fused parameters of a file; raises CheckpointError if it has other pairs than those of the targets."""
    heights: dict[str, set[int]] = {}
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match is not None:
            heights.setdefault(match[1], set()).add(match[2].count("."))
    stacks = []
    for module, found in heights.items():
        own = [p for p in layers if not set(targets).isdisjoint(endings(f"{module}.{p}"))]
        if not own:
            continue
        if found != set(range(len(own))):
            raise CheckpointError(
                f"{printable(module, 200)} has {len(found)} pairs, and target_parameters names {len(own)} of {list(layers)}."
            )
        nested = nested_names(module, own)
        stacks += [_Stack(module, parameter, f"{PREFIX}{nested[parameter]}.lora_") for parameter in own]
    return stacks


def _pairs(tensors: Mapping[str, Tensor], key: str, r: int, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each part (A, B) of all experts, shapes (experts, r, in) and (experts, out, r), without unused ranks."""
    A, B = tensors[f"{key}A.weight"], tensors[f"{key}B.weight"]
    if A.ndim != 2 or B.ndim != 2 or len(A) % r or B.shape[1] != len(A) or len(B) % parts or not len(A):
        raise CheckpointError(
            f"{printable(key, 200)}A and B are {list(A.shape)} and {list(B.shape)}, not those of experts of rank {r} in "
            f"{parts} parts."
        )
    down, up = split_rows(A, len(A) // r), split_columns(B, len(A) // r)
    for part in up.chunk(parts, 1):
        used = part.ne(0).any(0).any(0)
        chosen = used if used.any() else torch.ones_like(used)
        yield down[:, chosen], part[:, :, chosen]


def _alpha(config: Any, r: int) -> float:
    """The alpha that gives rank r the scaling of this configuration."""
    alpha: float = config.scaling * (r**0.5 if config.use_rslora else r)
    if not config.use_rslora and (config.lora_alpha * r) % config.r == 0:
        alpha = config.lora_alpha * r / config.r
    return plain(alpha)


def _options(
    config: AdapterConfig, stacks: Sequence[_Stack], of_layers: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The options of the configuration with the layers' ranks and alphas, by option, and without the parameters."""
    ours = {entry for stack in stacks for entry in endings(stack.name)}
    values = config.to_dict()
    values["target_parameters"] = [entry for entry in values["target_parameters"] if entry not in ours] or None
    for option, own in of_layers.items():
        # One key for a layer of all experts.
        general = {old: re.sub(r".*\.([^.]+)\.\d+\.([^.]+)", r"\1\\.\\d+\\.\2", old) for old in own}
        keys, table = by_shorter_key(own, general), PATTERN_TABLES[option]
        before = {key: value for key, value in values[table].items() if key not in ours}
        values[table] = {**keys, **before} if before or set(keys.values()) != {values[option]} else {}
    return values
