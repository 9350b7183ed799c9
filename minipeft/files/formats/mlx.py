"""mlx-lm's adapters: ``adapters.safetensors``, and ``adapter_config.json`` with the options of the training run.

A linear layer there computes ``x W^T + scale (x lora_a) lora_b`` with `lora_a` (in, r) and `lora_b` (r, out), and an
embedding ``lora_a[tokens] lora_b``, so both factors are the transposes of PEFT's; see ``mlx_lm/tuner/lora.py`` and
``mlx_lm/tuner/utils.py``. `m` (out,) is DoRA's magnitude. The update is scaled by `scale` itself, not by scale / r.

Experts have `lora_a` (experts, r, in) and `lora_b` (experts, out, r). Each becomes a layer of its own here, under the name
that it has in transformers 4; where the model has all experts in one parameter, `minipeft.files.names` stacks them again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minipeft.errors import CheckpointError, told
from minipeft.files.formats.foreign import Format, Module, Part, Source, part, rank_of
from minipeft.files.tensor_file import Entry, TensorFile

ENDS = ("lora_a", "lora_b", "m")
EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embedding"}

AROUND_EXPERTS = ("switch_mlp", "switch_glu", "experts")  # mlx-lm's module around the three layers of all experts
LAYERS = {
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "fc1": "up_proj",
    "fc2": "down_proj",
}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # where transformers says block_sparse_moe


def knows(file: TensorFile) -> bool:
    """Whether all keys end as mlx-lm's do."""
    keys = file.shapes
    ends = [key.rpartition(".")[2] for key in keys]
    return all(end in ENDS for end in ends) and "lora_a" in ends


def read(source: Source, component: str, keys: Sequence[str]) -> Part:
    """The adapter in PEFT's layout: the factors transposed, and alpha = scale * rank."""
    parameters = source.config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{source.directory}: adapter_config.json of mlx-lm has no lora_parameters.")
    scale, rank = parameters.get("scale"), parameters.get("rank")
    if not isinstance(scale, int | float) or not math.isfinite(scale) or not isinstance(rank, int):
        raise CheckpointError(
            f"{source.directory}: lora_parameters must say scale and rank, not {told(scale)} and {told(rank)}."
        )
    if "alpha" in parameters:
        raise CheckpointError(
            f"{source.directory}: lora_parameters has alpha besides scale. Early versions of mlx-lm scaled by "
            "scale * alpha / rank, and today's scale by scale. Put in what was meant, and take alpha out."
        )
    names = dict.fromkeys(key.rpartition(".")[0] for key in keys)
    modules: dict[str, Module] = {}
    for name in names:
        stacked = len(source.file.shapes.get(f"{name}.lora_a", ())) > 2
        modules |= _experts(source, name, scale) if stacked else {name: _module(source, name, scale)}
    model = source.config.get("model")
    values = {
        "lora_dropout": parameters.get("dropout", 0.0),
        "base_model_name_or_path": model if isinstance(model, str) else None,
    }
    return part(source, keys, modules, rank=rank, **values)


def _module(source: Source, name: str, scale: float) -> Module:
    a, b, m = (f"{name}.{end}" for end in ENDS)
    shapes = source.file.shapes
    rank = rank_of(source, a, b, down_axis=1, up_axis=0)
    is_embedding = name.rpartition(".")[2] in EMBEDDINGS
    if is_embedding and m in shapes:
        raise CheckpointError(f"{source.file.path}: {name} is an embedding with DoRA, which mlx-lm computes otherwise.")
    ends = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    tensors = {end: _transposed(source, key) for end, key in zip(ends, (a, b), strict=True)}
    if m in shapes:
        tensors["lora_magnitude_vector"] = source.file.entries[m]
    return Module(tensors, rank, scale * rank)


def _experts(source: Source, name: str, scale: float) -> dict[str, Module]:
    """One module for each expert of a layer for all of them."""
    a, b = f"{name}.lora_a", f"{name}.lora_b"
    down, up = (source.file.shapes.get(key, ()) for key in (a, b))
    around, _, layer = name.rpartition(".")
    while around.rpartition(".")[2] in AROUND_EXPERTS:
        around = around.rpartition(".")[0]
    table = MIXTRAL if around.endswith("block_sparse_moe") else LAYERS
    fits = len(down) == len(up) == 3 and down[0] == up[0] and down[1] == up[2] > 0
    if not fits or layer not in table:
        raise CheckpointError(
            f"{source.file.path}: {name} has factors {told([list(down), list(up)])}, not those of experts ((experts, r, in) and "
            f"(experts, out, r)) in one of {', '.join(table)}."
        )
    modules = {}
    for expert in range(down[0]):
        pick = functools.partial(torch.select, dim=0, index=expert)
        made = {
            "lora_A.weight": source.file.making(pick, [a], down[1:]),
            "lora_B.weight": source.file.making(pick, [b], up[1:]),
        }
        modules[f"{around}.experts.{expert}.{table[layer]}"] = Module(made, down[1], scale * down[1])
    return modules


def _transposed(source: Source, key: str) -> Entry:
    rows, columns = source.file.shapes[key]
    return source.file.making(Tensor.t, [key], (columns, rows))


MLX = Format("mlx-lm", knows, read)
