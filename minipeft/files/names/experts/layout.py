"""Files whose LoRA of fused experts has another layout than today's: PEFT's before 0.19.1, and Unsloth's.

Today A is (r * experts, in) with the experts one after the other, and B is (out, r * experts) with the expert's index
fastest, for the linear map that the parameter is. Two things may differ in a file:

- PEFT 0.17 and 0.18 took every stack for (experts, in, out), and 0.19.0 those that are so stored for (experts, out, in). Then
  A reads the output features and B writes the input features: the pair is that of the transposed map. Shapes show it, but
  not of square matrices, for which another pair of the file or ``peft_version`` has to.
- Unsloth had the expert's index of B slowest until September 2026, and says ``"lora_B_layout": "grouped_by_expert"`` since.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import CheckpointError, printable, told
from minipeft.files.format import AdapterFile
from minipeft.injection.plan import Plan
from minipeft.layers.uncalled import UncalledOps

GROUPED, RANK_MAJOR = "grouped_by_expert", "rank_major"
_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(\.?dev)?.*", re.DOTALL)
log = logging.getLogger("minipeft")


@dataclass(frozen=True)
class Stack:
    """The LoRA pair of one stack of experts, and the features of each expert's linear map."""

    name: str
    keys: tuple[str, str]
    experts: int
    in_features: int
    out_features: int
    is_transposed: bool

    def fits(self, file: AdapterFile, *, turned: bool) -> bool:
        """Whether the shapes in the file are those of this map, or of the transposed one."""
        sides = (self.out_features, self.in_features) if turned else (self.in_features, self.out_features)
        (ranks, first), (last, others) = (file.shapes[key] for key in self.keys)
        return (first, last) == sides and ranks == others and ranks % self.experts == 0


def todays_layout(file: AdapterFile, plan: Plan) -> AdapterFile:
    """The file with the factors of fused experts as they are today; nothing is read.

    Raises:
        CheckpointError: both layouts fit and nothing says which it is, or the file says a layout that is unknown.
    """
    stacks = list(_stacks(file, plan))
    if not stacks:
        return file
    grouped = _grouped(file, stacks)
    turned = "minipeft" not in file.metadata and _is_turned(file, stacks)
    changed = [stack for stack in stacks if turned or stack.name in grouped]
    if not changed:
        return file
    log.info(
        "%s: the LoRA of %s and %d more stacks of experts is read as %s.",
        file.path.parent,
        changed[0].name,
        len(changed) - 1,
        " and ".join(["PEFT wrote it before 0.19.1"] * turned + ["Unsloth wrote it, expert by expert"] * bool(grouped)),
    )
    entries = dict(file.entries)
    for stack in changed:
        sources = stack.keys[::-1] if turned else stack.keys
        for key, source in zip(stack.keys, sources, strict=True):
            is_B, shape = source == stack.keys[1], file.shapes[source]
            as_today = functools.partial(
                _as_today, experts=stack.experts, is_B=is_B, grouped=stack.name in grouped, turned=turned
            )
            entries[key] = file.making(as_today, [source], shape[::-1] if turned else shape)
    return replace(file, entries=entries)


def _as_today(factor: Tensor, experts: int, is_B: bool, grouped: bool, turned: bool) -> Tensor:
    """A factor of a stack, A or B in the file, in today's layout.

    `grouped`: B has the expert's index slowest. `turned`: it becomes the other factor, of the transposed map.
    """
    if is_B:  # (experts, r, features) of either layout
        split, order = ((experts, -1), (1, 2, 0)) if grouped else ((-1, experts), (2, 1, 0))
        stacked = factor.view(len(factor), *split).permute(order)
    else:
        stacked = factor.view(experts, -1, factor.shape[1])
    if is_B == turned:
        return stacked.reshape(-1, stacked.shape[2])
    return stacked.permute(2, 1, 0).reshape(stacked.shape[2], -1)


def _stacks(file: AdapterFile, plan: Plan) -> Iterator[Stack]:
    """The pairs of stacks that the file has as they stand in it; those made of single layers are today's."""
    for site in plan.adapters:
        base, ops = site.candidate.base, site.ops
        if not isinstance(ops, UncalledOps):
            continue
        keys = (f"{PREFIX}{site.name}.lora_A.weight", f"{PREFIX}{site.name}.lora_B.weight")
        entries, parameter = [file.entries.get(key) for key in keys], getattr(base, ops.parameter)
        as_stored = all(e is not None and e.function is None and len(e.shape) == 2 for e in entries)
        if as_stored and parameter.ndim == 3:
            (rows, in_features), experts = ops.shape(base), len(parameter)
            name = f"{site.name.replace('.base_layer', '')}.{ops.parameter}"
            turned = bool(getattr(base, "is_transposed", False))
            yield Stack(name, keys, experts, in_features, rows // experts, turned)


def _is_turned(file: AdapterFile, stacks: Sequence[Stack]) -> bool:
    """Whether the pairs are those of the transposed maps; raises CheckpointError if only some are, or nothing tells."""
    told_apart = [stack for stack in stacks if stack.in_features != stack.out_features]
    as_today = [stack for stack in told_apart if stack.fits(file, turned=False)]
    turned = [stack for stack in told_apart if stack.fits(file, turned=True)]
    if as_today and turned:
        raise CheckpointError(
            f"{file.path} has the LoRA of {as_today[0].name} as PEFT writes it and that of {turned[0].name} turned around, as "
            "PEFT did before 0.19.1. One file has one layout."
        )
    if told_apart:
        return bool(turned)
    version, square = file.said.get("peft_version"), stacks[0]
    reading = _by_version(version, square.is_transposed)
    if reading is None:
        raise CheckpointError(
            f"{file.path}: {square.name} is square ({square.in_features} x {square.out_features}), so its LoRA can be read in "
            f"two ways, and peft_version {told(version)} allows both: lora_A on the input, or on the output as PEFT had it "
            f'before 0.19.1. If it is on the input, write "peft_version": "0.19.1" into {file.path.parent}/adapter_config.json.'
        )
    return reading


def _by_version(version: object, is_transposed: bool) -> bool | None:
    """Whether this version of PEFT turned such a stack; None: perhaps, as that depended on whether transformers was loaded."""
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:  # not written before 0.18
        return False if is_transposed and version is None else None
    number, is_dev = tuple(int(part) for part in match.groups()[:3]), match[4] is not None
    if number >= (0, 19, 1) and not (is_dev and number < (0, 20, 0)):
        return False
    if is_dev or not is_transposed:
        return None
    return number == (0, 19, 0)


def _grouped(file: AdapterFile, stacks: Sequence[Stack]) -> set[str]:
    """Names of the stacks whose B has the expert's index slowest; refuses a layout that is unknown or contradicts itself."""
    overall, details = file.said.get("lora_B_layout"), file.said.get("unsloth_fused_expert_lora")
    if overall is None and details is None:
        return set()
    table = details if isinstance(details, Mapping) else {}
    listed = table.get("parameters")
    parameters: Mapping[str, Any] = listed if isinstance(listed, Mapping) else {}
    grouped = set()
    for stack in stacks:
        own = parameters.get(stack.name.rpartition(".")[2], {})
        layout = own.get("lora_B_layout", overall) if isinstance(own, Mapping) else own
        number = own.get("num_experts", stack.experts) if isinstance(own, Mapping) else stack.experts
        known = layout in (GROUPED, RANK_MAJOR) and (overall in (layout, "mixed", None))
        if not known or number != stack.experts or table.get("lora_A_layout", GROUPED) != GROUPED:
            raise CheckpointError(
                f"{file.path.parent}: lora_B_layout {told(layout)} of {told(number)} experts for {printable(stack.name, 200)}, "
                f"which has {stack.experts}; known: {GROUPED}, {RANK_MAJOR}."
            )
        grouped |= {stack.name} if layout == GROUPED else set()
    return grouped
