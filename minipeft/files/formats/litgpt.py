"""litgpt's adapters: ``lit_model.pth.lora``, ``hyperparameters.yaml`` and ``model_config.yaml``.

One layer computes q, k and v there: `lora_A` holds the A of those that are adapted one under the other, (n r, in), and
`lora_B` their B, (rows of them all, r); see ``LoRAQKVLinear`` in ``litgpt/lora.py``. They become three layers, or two. The
other layers are PEFT's under other names; see ``litgpt/scripts/convert_lit_checkpoint.py``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from torch import Tensor

from minipeft.errors import CheckpointError, told, told_error
from minipeft.files.formats.foreign import Computed, Format, Module, Part, Source, part, rank_of
from minipeft.files.reading import read_limited
from minipeft.files.tensor_file import TensorFile

LAYERS = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
FUSED = ("attn.qkv", "attn.attn")  # the second in litgpt's early versions
MAX_YAML_BYTES, MAX_YAML_DEPTH = 2**16, 16
_KEY = re.compile(r"(?:transformer\.h\.(\d{1,6})\.([\w.]+)|(lm_head))\.lora_([AB])")


def knows(file: TensorFile) -> bool:
    """Whether all keys are of litgpt's names and end as its keys do."""
    keys = file.shapes
    return all(_KEY.fullmatch(key) for key in keys) and any(key.endswith("lora_A") for key in keys)


def read(source: Source, component: str, keys: Sequence[str]) -> Part:
    """The adapter under transformers' names, with q, k and v apart."""
    training, model = (_yaml(source, name) for name in ("hyperparameters.yaml", "model_config.yaml"))
    family = (model.get("mlp_class_name"), str(model.get("name", "")).lower())
    if family[0] not in ("LLaMAMLP", "GemmaMLP") or family[1].startswith(("phi-3", "phi-4")):
        raise CheckpointError(
            f"{source.directory}: litgpt's {told(model.get('name'))} is a model whose layers transformers joins otherwise, "
            "which is not read. Merge it with litgpt merge_lora."
        )
    r, alpha = training.get("lora_r"), training.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, int | float) or r < 1:
        raise CheckpointError(f"{source.directory}: hyperparameters.yaml must say lora_r and lora_alpha.")
    modules: dict[str, Module] = {}
    for stem in dict.fromkeys(key.rpartition(".")[0] for key in keys):
        match = _KEY.fullmatch(f"{stem}.lora_A")
        assert match is not None
        layer = "lm_head" if match[3] else f"model.layers.{int(match[1])}"
        if match[2] in FUSED:
            split = _split(source, stem, training, model, r)
            modules |= {f"{layer}.self_attn.{name}": Module(tensors, r, alpha) for name, tensors in split}
        elif match[3] or match[2] in LAYERS:
            a, b = f"{stem}.lora_A", f"{stem}.lora_B"
            if rank_of(source, a, b, down_axis=0, up_axis=1) != r:
                raise CheckpointError(f"{source.file.path}: {stem} is not of rank {r}, as hyperparameters.yaml says.")
            name = layer if match[3] else f"{layer}.{LAYERS[match[2]]}"
            modules[name] = Module({"lora_A.weight": a, "lora_B.weight": b}, r, alpha)
    dropout = training.get("lora_dropout", 0.0)
    return part(source, keys, modules, lora_dropout=dropout, base_model_name_or_path=_base(model))


def _yaml(source: Source, name: str) -> Mapping[str, Any]:
    path = source.directory / name
    text = read_limited(path, MAX_YAML_BYTES)
    try:
        _check_plain(text)
        values = yaml.safe_load(text)
    except CheckpointError:
        raise
    except Exception as error:  # yaml's own, RecursionError, ValueError
        raise CheckpointError(f"{path} is not valid YAML ({told_error(error, 100)}).") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a mapping.")
    return values


def _check_plain(text: bytes) -> None:
    """Refuse what makes a small YAML text large or slow: aliases, and deep nesting. Raises ValueError."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.AliasEvent) or depth > MAX_YAML_DEPTH:
            raise ValueError(f"it has aliases, or is nested deeper than {MAX_YAML_DEPTH} levels")


def _base(model: Mapping[str, Any]) -> str | None:
    place = model.get("hf_config")
    parts = [place.get(key) for key in ("org", "name")] if isinstance(place, dict) else []
    named = [one for one in parts if isinstance(one, str)]
    return "/".join(named) if len(named) == 2 else None


def _split(
    source: Source, stem: str, training: Mapping[str, Any], model: Mapping[str, Any], r: int
) -> Iterator[tuple[str, dict[str, str | Computed]]]:
    """For each of q, k and v that is adapted: its name, and its rows of the common factors."""
    sizes = _sizes(source, model)
    adapted = [name for name, option in _OPTIONS.items() if training.get(option) is True]
    a, b = f"{stem}.lora_A", f"{stem}.lora_B"
    shapes = [source.file.shapes.get(key, ()) for key in (a, b)]
    rows = sum(sizes[name] for name in adapted)
    if len(shapes[0]) != 2 or shapes[0][0] != r * len(adapted) or shapes[1] != (rows, r):
        raise CheckpointError(
            f"{source.file.path}: {stem} has factors {told([list(s) for s in shapes])}; the two YAML files ask for "
            f"{r * len(adapted)} rows of A and {[rows, r]} of B."
        )
    row = 0
    for place, name in enumerate(adapted):
        tensors: dict[str, str | Computed] = {}
        for end, key, start, count in (("A", a, place * r, r), ("B", b, row, sizes[name])):
            shape = (count, source.file.shapes[key][1])
            cut = functools.partial(_rows, start=start, count=count)
            tensors[f"lora_{end}.weight"] = Computed((key,), shape, source.file.dtypes[key], cut)
        row += sizes[name]
        yield name, tensors


_OPTIONS = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value"}


def _sizes(source: Source, model: Mapping[str, Any]) -> dict[str, int]:
    """How many rows each of the three has; `litgpt.Config` fills in what is null in the same way."""
    heads, width = model.get("n_head"), model.get("n_embd")
    groups, size = model.get("n_query_groups"), model.get("head_size")
    groups = heads if groups is None else groups
    if size is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        size = width // heads
    numbers = (heads, groups, size)
    if not all(isinstance(n, int) and 0 < n < 10**6 for n in numbers):
        raise CheckpointError(
            f"{source.directory}: model_config.yaml must say n_head, n_query_groups and head_size, not {told(numbers)}."
        )
    assert isinstance(heads, int)
    assert isinstance(groups, int)
    assert isinstance(size, int)
    return {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}


def _rows(whole: Tensor, start: int, count: int) -> Tensor:
    return whole[start : start + count]


LITGPT = Format("litgpt", knows, read)
