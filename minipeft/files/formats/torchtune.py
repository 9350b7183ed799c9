"""torchtune's adapters under its own names, which it writes next to PEFT's format, or alone where it cannot convert.

``layers.0.attn.q_proj.lora_a.weight`` (r, in) and ``lora_b`` (out, r) are PEFT's factors under other names; see
``torchtune/models/convert_weights.py``. Its models of Llama's kind rotate neighbouring features, and transformers' rotate
halves, so for these the rows of ``lora_b`` of q and k are put in order, which needs the number of heads. That is in
``config.json`` of the base, which torchtune copies beside the adapter.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from minipeft.errors import CheckpointError, told
from minipeft.files.formats.foreign import Format, Module, Part, Source, part, rank_of
from minipeft.files.reading import read_object
from minipeft.files.tensor_file import TensorFile

NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
# Whether torchtune's model of this kind rotates neighbouring features, by ``model_type``.
ROTATES_NEIGHBOURS = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False}
_KEY = re.compile(r"(?:layers\.(\d{1,6})\.((?:attn|mlp)\.\w+)|(output))\.(lora_a\.weight|lora_b\.weight|magnitude)")


def knows(file: TensorFile) -> bool:
    """Whether all keys end as torchtune's do."""
    keys = file.shapes
    ends = (".lora_a.weight", ".lora_b.weight", ".magnitude")
    return all(key.endswith(ends) for key in keys) and any(key.endswith(ends[0]) for key in keys)


def read(source: Source, component: str, keys: Sequence[str]) -> Part:
    """The adapter under transformers' names, with the rows of q and k in transformers' order."""
    r, alpha = source.config.get("r"), source.config.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"{source.directory}: torchtune's adapter_config.json must say r and lora_alpha; without them its scale is unknown."
        )
    base = _base_config(source)
    names: dict[str, str] = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        inner = match and (match[3] or NAMES.get(match[2]))
        if match is None or inner is None:
            raise CheckpointError(f"{source.file.path}: {told(key, 200)} is a layer that transformers has no name for.")
        stem = key[: match.start(4) - 1]
        names[stem] = "lm_head" if match[3] else f"model.layers.{int(match[1])}.{inner}"
    modules = {name: _module(source, stem, base, alpha) for stem, name in names.items()}
    place = source.config.get("base_model_name_or_path")
    return part(source, keys, modules, rank=r, base_model_name_or_path=place if isinstance(place, str) else None)


def _base_config(source: Source) -> Mapping[str, Any]:
    path = source.directory / "config.json"
    values = read_object(path)
    inner = values.get("text_config")
    values = inner if isinstance(inner, dict) else values
    if values.get("model_type") not in ROTATES_NEIGHBOURS:
        raise CheckpointError(
            f"{path}: model_type {told(values.get('model_type'))} is none whose torchtune layout is known "
            f"({', '.join(ROTATES_NEIGHBOURS)})."
        )
    return values


def _module(source: Source, stem: str, base: Mapping[str, Any], alpha: float) -> Module:
    a, b, m = (f"{stem}.{end}" for end in ("lora_a.weight", "lora_b.weight", "magnitude"))
    file, rank = source.file, rank_of(source, a, b)
    heads = {"attn.q_proj": "num_attention_heads", "attn.k_proj": "num_key_value_heads"}
    option = next((name for end, name in heads.items() if stem.endswith(end)), None)
    keys = {"lora_B.weight": b, **({"lora_magnitude_vector": m} if m in file.shapes else {})}
    if option is None or not ROTATES_NEIGHBOURS[base["model_type"]]:
        return Module({end: file.entries[key] for end, key in {"lora_A.weight": a, **keys}.items()}, rank, alpha)
    count = base.get(option, base.get("num_attention_heads"))
    made = {}
    for end, key in keys.items():
        shape = file.shapes[key]
        if not isinstance(count, int) or count < 1 or shape[0] % (2 * count):
            raise CheckpointError(f"{file.path}: {key} has {shape[0]} rows for {told(count)} heads.")
        made[end] = file.making(functools.partial(_halves, heads=count), [key], shape)
    return Module({"lora_A.weight": file.entries[a], **made}, rank, alpha)


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * size, ...) with the two features of each rotated pair half a head apart instead of side by side."""
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return paired.transpose(1, 2).reshape(rows.shape)


TORCHTUNE = Format("torchtune", knows, read)
