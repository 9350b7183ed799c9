"""The methods of LyCORIS's files that PEFT's kind has too: LoRA (LoCon), LoHa and LoKr."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minipeft.errors import CheckpointError, shown
from minipeft.files.formats.foreign import Computed, Module, Source, rank_of
from minipeft.methods.lokr import factorise

LORA = {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale"}
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}
ENDS = sorted(LORA | LOHA | LOKR)
Ends = Mapping[str, Mapping[str, str]]  # module -> end of the key -> key


@dataclass(frozen=True)
class Method:
    """What the modules of a file come to."""

    peft_type: str
    modules: Mapping[str, Module]
    values: Mapping[str, Any]
    spent: Collection[str] = ()


def method(source: Source, modules: Ends, alphas: Mapping[str, float]) -> Method:
    """The method that all modules of a file have, with each module's tensors, rank and alpha.

    Raises:
        CheckpointError: they have several, or their tensors are not those of one.
    """
    used = {end for ends in modules.values() for end in ends} - {"alpha"}
    for ends, read in ((LORA, _lora), (LOHA, _loha), (LOKR, _lokr)):
        if used and used <= ends:
            return read(source, modules, alphas)
    raise CheckpointError(
        f"{source.file.path}: its modules have {shown(sorted(used), 8)}, which are not of one method."
    )


def _alpha(ends: Mapping[str, str], alphas: Mapping[str, float], r: int) -> float:
    return alphas.get(ends.get("alpha", ""), 0.0) or r


def _lora(source: Source, modules: Ends, alphas: Mapping[str, float]) -> Method:
    with_dora = [name for name, ends in modules.items() if "dora_scale" in ends]
    if with_dora and len(with_dora) < len(modules):
        raise CheckpointError(f"{source.file.path}: only {len(with_dora)} of {len(modules)} modules have dora_scale.")
    found = {name: _lora_module(source, name, ends, alphas) for name, ends in modules.items()}
    return Method("LORA", found, {"use_dora": True} if with_dora else {})


def _lora_module(source: Source, name: str, ends: Mapping[str, str], alphas: Mapping[str, float]) -> Module:
    down, up, mid, dora = (
        ends.get(end, "") for end in ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale")
    )
    shapes, dtypes, path = source.file.shapes, source.file.dtypes, source.file.path
    if mid:
        return _with_core(source, name, ends, alphas)
    rank = rank_of(source, down, up, down_axis=0, up_axis=1)
    tensors: dict[str, str | Computed] = {"lora_A.weight": down, "lora_B.weight": up}
    if dora:
        rows = shapes[up][0]
        if shapes[dora] != (rows, 1) or len(shapes[down]) != 2 or rows == 1:
            raise CheckpointError(
                f"{path}: {name} has a dora_scale of {list(shapes[dora])}; {[rows, 1]} is read, of a linear layer."
            )
        tensors["lora_magnitude_vector"] = Computed((dora,), (rows,), dtypes[dora], Tensor.flatten)
    return Module(tensors, rank, _alpha(ends, alphas, rank))


def _with_core(source: Source, name: str, ends: Mapping[str, str], alphas: Mapping[str, float]) -> Module:
    """A kernel in Tucker's form: `lora_down` (r, in, 1, 1) and `lora_mid` (r, r, *kernel) make one A (r, in, *kernel)."""
    down, up, mid = (ends.get(f"lora_{end}.weight", "") for end in ("down", "up", "mid"))
    shapes = source.file.shapes
    core, first, last = (shapes.get(key, ()) for key in (mid, down, up))
    rank = core[0] if core else 0
    fits = len(core) == len(first) == len(last) > 2 and core[1] == first[0] and last[1] == rank
    if "dora_scale" in ends or not fits or any(n != 1 for n in (*first[2:], *last[2:])):
        raise CheckpointError(
            f"{source.file.path}: {name}: lora_down, lora_mid and lora_up of {[first, core, last]} do not fit."
        )
    made = Computed((mid, down), (rank, first[1], *core[2:]), source.file.dtypes[down], _through_core)
    return Module({"lora_A.weight": made, "lora_B.weight": up}, rank, _alpha(ends, alphas, first[0]))


def _through_core(mid: Tensor, down: Tensor) -> Tensor:
    product = torch.einsum("ab...,bi->ai...", mid.double(), down.double().flatten(1))
    return product.to(down.dtype)


def _loha(source: Source, modules: Ends, alphas: Mapping[str, float]) -> Method:
    found = {}
    for name, ends in modules.items():
        ranks = {
            rank_of(source, ends.get(f"hada_w{i}_b", ""), ends.get(f"hada_w{i}_a", ""), down_axis=0, up_axis=1)
            for i in (1, 2)
        }
        if len(ranks) > 1:
            raise CheckpointError(f"{source.file.path}: the two factors of {name} have ranks {shown(sorted(ranks))}.")
        rank = ranks.pop()
        found[name] = Module({end: ends[end] for end in sorted(LOHA)}, rank, _alpha(ends, alphas, rank))
    return Method("LOHA", found, {})


class _Kronecker(NamedTuple):
    """The shapes of the two factors of a LoKr module, (l, m) and (k, n), and the ranks of those that are products."""

    left: tuple[int, int]
    right: tuple[int, int]
    ranks: tuple[int | None, int | None]


def _lokr(source: Source, modules: Ends, alphas: Mapping[str, float]) -> Method:
    shapes = {name: _kronecker(source, name, ends) for name, ends in modules.items()}
    found, both = {}, any(shape.ranks[0] is not None for shape in shapes.values())
    for name, ends in modules.items():
        shape = shapes[name]
        given = {rank for rank in shape.ranks if rank is not None}
        if len(given) > 1:
            raise CheckpointError(f"{source.file.path}: the two factors of {name} have ranks {shown(sorted(given))}.")
        # Two whole factors have no rank, and LyCORIS does not scale them; PEFT's kind has whole ones from half the size on.
        rank = given.pop() if given else (max(*shape.left, *shape.right) + 1) // 2
        alpha = _alpha(ends, alphas, rank) if any(shape.ranks) else rank
        found[name] = Module({end: key for end, key in ends.items() if end != "alpha"}, rank, alpha)
        expected = (
            rank if both and rank < max(shape.left) / 2 else None,
            rank if rank < max(shape.right) / 2 else None,
        )
        if shape.ranks != expected:
            raise CheckpointError(
                f"{source.file.path}: {name} has whole factors where PEFT's LoKr has products, or the reverse."
            )
    near = next(_near(list(shapes.values())), None)
    if near is None:
        raise CheckpointError(
            f"{source.file.path}: LyCORIS split its layers otherwise than any decompose_factor of PEFT's LoKr."
        )
    return Method("LOKR", found, {"decompose_both": both, "decompose_factor": near})


def _kronecker(source: Source, name: str, ends: Mapping[str, str]) -> _Kronecker:
    factors: list[tuple[int, int]] = []
    ranks: list[int | None] = []
    for which in ("lokr_w1", "lokr_w2"):
        parts = {end for end in ends if end.startswith(which)}
        if parts not in ({which}, {f"{which}_a", f"{which}_b"}):
            raise CheckpointError(f"{source.file.path}: {name} has {shown(sorted(parts))} for {which}.")
        keys = [ends[end] for end in sorted(parts)]
        if len(keys) == 2:
            ranks.append(rank_of(source, keys[1], keys[0], down_axis=0, up_axis=1))
        else:
            ranks.append(None)
        rows, columns = source.file.shapes[keys[0]], source.file.shapes[keys[-1]]
        if len(rows) != 2 or len(columns) != 2:
            raise CheckpointError(
                f"{source.file.path}: {name} is not a linear layer, the only kind whose LoKr is read."
            )
        factors.append((rows[0], columns[1]))
    return _Kronecker(factors[0], factors[1], (ranks[0], ranks[1]))


def _near(shapes: Sequence[_Kronecker]) -> Iterator[int]:
    """The values of ``decompose_factor`` that split all layers as these are split."""
    common = Counter(size for shape in shapes for size in shape.left).most_common(8)
    for near in (-1, *(size for size, _ in common)):
        if all(_splits(shape, near) for shape in shapes):
            yield near


def _splits(shape: _Kronecker, near: int) -> bool:
    sizes: Iterable[tuple[int, int]] = zip(shape.left, shape.right, strict=True)
    return all(factorise(one * other, near) == (one, other) for one, other in sizes)
