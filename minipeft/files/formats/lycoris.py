"""The methods of LyCORIS's files that PEFT has too: LoRA (LoCon), LoHa and LoKr."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minipeft.errors import CheckpointError, shown
from minipeft.files.formats.foreign import Module, Source, rank_of
from minipeft.files.tensor_file import Entry
from minipeft.methods.lokr import factorise

LORA = {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale"}
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOHA_CORES = {"hada_t1", "hada_t2"}
LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
# How many positions a kernel may have whose columns a LoKr factor without a core holds flattened.
KERNELS = (1, 9, 3, 5, 7, 25, 27, 49)
ENDS = sorted(LORA | LOHA | LOHA_CORES | LOKR)
Ends = Mapping[str, Mapping[str, str]]  # module -> end of the key -> key
Read = tuple[dict[str, Module], dict[str, Any]]  # the modules, and options of the method


def method(source: Source, modules: Ends, alphas: Mapping[str, float]) -> tuple[str, dict[str, Module], dict[str, Any]]:
    """The method that all modules of a file have: ``peft_type``, each module's tensors, and more of the configuration.

    Raises:
        CheckpointError: they have several, or their tensors are not those of one.
    """
    used = {end for ends in modules.values() for end in ends} - {"alpha"}
    for name, ends, read in (("LORA", LORA, _lora), ("LOHA", LOHA | LOHA_CORES, _loha), ("LOKR", LOKR, _lokr)):
        if used and used <= ends:
            return name, *read(source, modules, alphas)
    raise CheckpointError(
        f"{source.file.path}: its modules have {shown(sorted(used), 8)}, which are not of one method."
    )


def _alpha(ends: Mapping[str, str], alphas: Mapping[str, float], r: int) -> float:
    return alphas.get(ends.get("alpha", ""), 0.0) or r


def _lora(source: Source, modules: Ends, alphas: Mapping[str, float]) -> Read:
    with_dora = [name for name, ends in modules.items() if "dora_scale" in ends]
    if with_dora and len(with_dora) < len(modules):
        raise CheckpointError(f"{source.file.path}: only {len(with_dora)} of {len(modules)} modules have dora_scale.")
    return {name: _lora_module(source, name, ends, alphas) for name, ends in modules.items()}, {}


def _lora_module(source: Source, name: str, ends: Mapping[str, str], alphas: Mapping[str, float]) -> Module:
    down, up, mid, dora = (
        ends.get(end, "") for end in ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale")
    )
    file, shapes = source.file, source.file.shapes
    if mid:
        return _with_core(source, name, ends, alphas)
    rank = rank_of(source, down, up)
    tensors = {"lora_A.weight": file.entries[down], "lora_B.weight": file.entries[up]}
    if dora:
        rows, ones = shapes[up][0], (1,) * (len(shapes[down]) - 1)
        if shapes[dora] != (rows, *ones) or rows == 1:
            raise CheckpointError(
                f"{file.path}: {name} has a dora_scale of {list(shapes[dora])}; {[rows, *ones]} is read, one number for each output."
            )
        shape = (1, rows, *ones[1:]) if ones[1:] else (rows,)
        as_peft_has_it = functools.partial(torch.reshape, shape=shape)
        tensors["lora_magnitude_vector"] = file.making(as_peft_has_it, [dora], shape)
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
    made = source.file.making(_through_core, [down, mid], (rank, first[1], *core[2:]))
    tensors = {"lora_A.weight": made, "lora_B.weight": source.file.entries[up]}
    return Module(tensors, rank, _alpha(ends, alphas, first[0]))


def _through_core(down: Tensor, mid: Tensor) -> Tensor:
    product = torch.einsum("ab...,bi->ai...", mid.double(), down.double().flatten(1))
    return product.to(down.dtype)


def _loha(source: Source, modules: Ends, alphas: Mapping[str, float]) -> Read:
    found = {}
    for name, ends in modules.items():
        cores = LOHA_CORES & ends.keys()
        if cores and cores != LOHA_CORES:
            raise CheckpointError(f"{source.file.path}: {name} has {shown(sorted(cores))} alone.")
        ranks = {
            rank_of(source, ends.get(f"hada_w{i}_b", ""), ends.get(f"hada_w{i}_a", ""), up_axis=0 if cores else 1)
            for i in (1, 2)
        }
        if len(ranks) > 1:
            raise CheckpointError(f"{source.file.path}: the two factors of {name} have ranks {shown(sorted(ranks))}.")
        rank = ranks.pop()
        tensors = {end: source.file.entries[ends[end]] for end in sorted(LOHA)}
        tensors |= {end: _core(source, name, ends[end], rank) for end in sorted(cores)}
        found[name] = Module(tensors, rank, _alpha(ends, alphas, rank))
    return found, _cores(modules, LOHA_CORES)


def _core(source: Source, name: str, key: str, rank: int) -> Entry:
    """A core (r, r, *kernel) in PEFT's shape, which has two dimensions for a kernel of one."""
    shape = source.file.shapes[key]
    if len(shape) < 3 or shape[:2] != (rank, rank):
        raise CheckpointError(f"{source.file.path}: {name} has a core of {list(shape)}, and is of rank {rank}.")
    return _kernel(source, key)


def _kernel(source: Source, key: str) -> Entry:
    """A kernel of one dimension gets a second one, of size 1, as here; others stay."""
    shape = source.file.shapes[key]
    if len(shape) != 3:
        return source.file.entries[key]
    return source.file.making(lambda kernel: kernel.unsqueeze(-1), [key], (*shape, 1))


def _cores(modules: Ends, ends: set[str]) -> dict[str, Any]:
    """The option of a file with cores; that all kernels have one, only the model can say."""
    return {"use_effective_conv2d": True} if any(not ends.isdisjoint(own) for own in modules.values()) else {}


class _Kronecker(NamedTuple):
    """The shapes of the two factors of a LoKr module, (l, m) and (k, n), and the ranks of those that are products.

    `flat` says that n may be several columns, of all positions of a kernel.
    """

    left: tuple[int, int]
    right: tuple[int, int]
    ranks: tuple[int | None, int | None]
    flat: bool

    def columns(self) -> Iterator[int]:
        """What n may be of one position."""
        yield from (self.right[1] // size for size in KERNELS[: None if self.flat else 1] if self.right[1] % size == 0)


def _lokr(source: Source, modules: Ends, alphas: Mapping[str, float]) -> Read:
    shapes = {name: _kronecker(source, name, ends) for name, ends in modules.items()}
    found, both = {}, any(shape.ranks[0] is not None for shape in shapes.values())
    for name, ends in modules.items():
        shape = shapes[name]
        given = {rank for rank in shape.ranks if rank is not None}
        if len(given) > 1:
            raise CheckpointError(f"{source.file.path}: the two factors of {name} have ranks {shown(sorted(given))}.")
        # Two whole factors have no rank, and LyCORIS does not scale them. PEFT keeps a factor whole from half its size on.
        rank = given.pop() if given else (max(*shape.left, *shape.right) + 1) // 2
        alpha = _alpha(ends, alphas, rank) if any(shape.ranks) else rank
        tensors = {end: source.file.entries[key] for end, key in ends.items() if end != "alpha"}
        if "lokr_t2" in ends:
            tensors["lokr_t2"] = _core(source, name, ends["lokr_t2"], rank)
        if "lokr_w2" in ends:
            tensors["lokr_w2"] = _kernel(source, ends["lokr_w2"])
        found[name] = Module(tensors, rank, alpha)
        left = rank if both and rank < max(shape.left) / 2 else None
        right = {rank if rank < max(shape.right[0], n) / 2 else None for n in shape.columns()}
        if shape.ranks[0] != left or shape.ranks[1] not in right:
            raise CheckpointError(
                f"{source.file.path}: {name} has whole factors where PEFT's LoKr has products, or the reverse."
            )
    values = {"decompose_both": both, "decompose_factor": _near(source, list(shapes.values()))}
    return found, values | _cores(modules, {"lokr_t2"})


def _kronecker(source: Source, name: str, ends: Mapping[str, str]) -> _Kronecker:
    factors: list[tuple[int, int]] = []
    ranks: list[int | None] = []
    core = "lokr_t2" in ends
    for which in ("lokr_w1", "lokr_w2"):
        parts = {end for end in ends if end.startswith(which)}
        if parts not in ({which}, {f"{which}_a", f"{which}_b"}) or (which == "lokr_w2" and core and len(parts) == 1):
            raise CheckpointError(f"{source.file.path}: {name} has {shown(sorted(parts))} for {which}.")
        keys = [ends[end] for end in sorted(parts)]
        turned = core and which == "lokr_w2"  # its up projection is stored (r, k) then
        ranks.append(rank_of(source, keys[1], keys[0], up_axis=0 if turned else 1) if len(keys) == 2 else None)
        rows, columns = source.file.shapes[keys[0]], source.file.shapes[keys[-1]]
        is_kernel_possible = which == "lokr_w2" and len(keys) == 1
        if len(rows) < 2 or (len(rows) > 2 and not is_kernel_possible) or len(keys) == 2 < len(columns):
            raise CheckpointError(f"{source.file.path}: {name} has a {which} of {[list(rows), list(columns)]}.")
        factors.append((rows[1] if turned else rows[0], columns[1]))
    return _Kronecker(factors[0], factors[1], (ranks[0], ranks[1]), ranks[1] is not None and not core)


def _near(source: Source, shapes: Sequence[_Kronecker]) -> int:
    """The ``decompose_factor`` that splits all layers as these are split; of several the one that takes most for linear."""
    common = Counter(size for shape in shapes for size in shape.left).most_common(8)
    fitting = {
        near: sum(_splits(shape, near, shape.right[1]) for shape in shapes)
        for near in (-1, *(size for size, _ in common))
        if all(any(_splits(shape, near, n) for n in shape.columns()) for shape in shapes)
    }
    if not fitting:
        raise CheckpointError(
            f"{source.file.path}: LyCORIS split its layers otherwise than any decompose_factor of PEFT's LoKr."
        )
    return max(fitting, key=fitting.__getitem__)


def _splits(shape: _Kronecker, near: int, columns: int) -> bool:
    (rows, m), k = shape.left, shape.right[0]
    return factorise(rows * k, near) == (rows, k) and factorise(m * columns, near) == (m, columns)
