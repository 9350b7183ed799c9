"""litgpt's adapters: ``lit_model.pth.lora``, ``hyperparameters.yaml`` and ``model_config.yaml``.

One layer computes q, k and v there: `lora_A` holds the A of those that are adapted one under the other, (n r, in), and
`lora_B` their B, (rows of them all, r); see ``LoRAQKVLinear`` in ``litgpt/lora.py``. The other layers are PEFT's under other
names, and some are one layer in transformers, see `minipeft.files.formats.litgpt_families`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from minipeft.errors import CheckpointError, told, told_error
from minipeft.files.formats.foreign import Format, Module, Part, Source, part, rank_of
from minipeft.files.formats.litgpt_families import Family, family
from minipeft.files.reading import read_limited
from minipeft.files.tensor_file import TensorFile

OPTIONS = ("lora_query", "lora_key", "lora_value")
LEGACY = "attn.attn"  # the layer's name up to litgpt 0.5.4
FUSED = ("attn.qkv", LEGACY)
MAX_YAML_BYTES, MAX_YAML_DEPTH = 2**16, 16
_KEY = re.compile(r"(?:transformer\.h\.(\d{1,6})\.([\w.]+)|(lm_head))\.lora_([AB])")


def knows(file: TensorFile) -> bool:
    """Whether all keys have litgpt's names and endings."""
    keys = file.shapes
    return all(_KEY.fullmatch(key) for key in keys) and any(key.endswith("lora_A") for key in keys)


def read(source: Source, component: str, keys: Sequence[str]) -> Part:
    """The adapter under transformers' names."""
    training, model = (_yaml(source, name) for name in ("hyperparameters.yaml", "model_config.yaml"))
    known = family(str(model.get("name", "")), model.get("mlp_class_name"))
    if known is None:
        raise CheckpointError(
            f"{source.directory}: the mlp_class_name {told(model.get('mlp_class_name'))} of model_config.yaml is not one of "
            "litgpt 0.5. Merge the adapter with litgpt merge_lora."
        )
    r, alpha = training.get("lora_r"), training.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, int | float) or r < 1:
        raise CheckpointError(f"{source.directory}: hyperparameters.yaml must say lora_r and lora_alpha.")
    modules: dict[str, Module] = {}
    for stem in dict.fromkeys(key.rpartition(".")[0] for key in keys):
        match = _KEY.fullmatch(f"{stem}.lora_A")
        assert match is not None
        inner = match[2]
        if inner in FUSED:
            adapted = [place for place, option in enumerate(OPTIONS) if training.get(option) is True]
            made = _qkv(source, stem, adapted, _heads(source, model), known, r, alpha)
        elif inner == "mlp.fc_1" and known.gate_up:
            made = {known.gate_up: _joined(source, stem, f"{stem.removesuffix('1')}2", r, alpha)}
        else:
            name = known.head if match[3] else known.name(inner)
            made = {} if name is None else {name: _plain(source, stem, r, alpha)}
        first = "" if match[3] else f"{known.layers}.{int(match[1])}."
        modules |= {f"{first}{name}": module for name, module in made.items()}
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


def _plain(source: Source, stem: str, r: int, alpha: float) -> Module:
    a, b = f"{stem}.lora_A", f"{stem}.lora_B"
    if rank_of(source, a, b) != r:
        raise CheckpointError(f"{source.file.path}: {stem} is not of rank {r}, as hyperparameters.yaml says.")
    entries = source.file.entries
    return Module({"lora_A.weight": entries[a], "lora_B.weight": entries[b]}, r, alpha)


def _joined(source: Source, one: str, two: str, r: int, alpha: float) -> Module:
    """Two layers with the same input as one."""
    for stem in (one, two):
        _plain(source, stem, r, alpha)
    (a, b), (c, d) = ((f"{stem}.lora_A", f"{stem}.lora_B") for stem in (one, two))
    shapes, making = source.file.shapes, source.file.making
    tensors = {
        "lora_A.weight": making(lambda *downs: torch.cat(downs), [a, c], (2 * r, shapes[a][1])),
        "lora_B.weight": making(torch.block_diag, [b, d], (shapes[b][0] + shapes[d][0], 2 * r)),
    }
    return Module(tensors, 2 * r, 2 * alpha)


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


def _heads(source: Source, model: Mapping[str, Any]) -> Heads:
    """The attention's heads; `litgpt.Config` fills in what is null in the same way."""
    count, width = model.get("n_head"), model.get("n_embd")
    groups, size = model.get("n_query_groups"), model.get("head_size")
    groups = count if groups is None else groups
    if size is None and isinstance(width, int) and isinstance(count, int) and count > 0:
        size = width // count
    numbers = [n for n in (count, groups, size) if isinstance(n, int) and 0 < n < 10**6]
    if len(numbers) < 3 or numbers[0] % numbers[1]:
        raise CheckpointError(
            f"{source.directory}: model_config.yaml must say n_head, n_query_groups and head_size, not "
            f"{told((count, groups, size))}."
        )
    return Heads(*numbers)


def _qkv(
    source: Source, stem: str, adapted: Sequence[int], heads: Heads, family: Family, r: int, alpha: float
) -> dict[str, Module]:
    """The modules that an adapted layer of q, k and v becomes, by the end of transformers' name.

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
            B = functools.partial(_up, blocks=blocks, used=used, rows=rows, features=sum(heads.rows))
            tensors = {
                "lora_A.weight": source.file.making(A, [a], (r * len(used), shapes[0][1])),
                "lora_B.weight": source.file.making(B, [b], (len(rows), r * len(used))),
            }
            made[name] = Module(tensors, r * len(used), alpha * len(used))
    return made


def _down(A: Tensor, used: Sequence[int], r: int) -> Tensor:
    return torch.cat([A[r * number : r * (number + 1)] for number in used])


def _up(B: Tensor, blocks: Sequence[Tensor], used: Sequence[int], rows: Tensor, features: int) -> Tensor:
    """The rows of B for these of all output features, those of each block in columns of its own."""
    parts = torch.split(B, [len(block) for block in blocks])
    whole = B.new_zeros(features, len(used), B.shape[1])
    for column, number in enumerate(used):
        whole[blocks[number], column] = parts[number]
    return whole[rows].flatten(1)


LITGPT = Format("litgpt", knows, read)
