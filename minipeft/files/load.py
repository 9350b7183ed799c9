"""Reading an adapter directory: whether it fits a model, and the parts it describes for that model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from minipeft.errors import CheckpointError, nearest, shown
from minipeft.files.atomic import read_limited
from minipeft.files.base_samples import check_base
from minipeft.files.format import MAX_HEADER_BYTES, AdapterFile, open_adapter
from minipeft.files.resized_vocabulary import brought, resize_hint
from minipeft.injection.build import PREFIX, Parts, build, build_from
from minipeft.injection.plan import Plan
from minipeft.injection.plan import plan as plan_injection
from minipeft.methods.base import Adapter


@dataclass(frozen=True)
class Fit:
    """How a file's tensors compare with what a model expects."""

    expected: frozenset[str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    copies_of_base: Mapping[str, Tensor]  # keys that hold a base tensor, as PEFT writes for embedding tables
    repeated: Mapping[str, str]  # keys that repeat another, as PEFT writes for the bias of a trained head

    def __str__(self) -> str:
        return "; ".join(
            f"{what} {shown(keys)}"
            for what, keys in (("missing", self.missing), ("unexpected", self.unexpected))
            if keys
        )


def compare(
    file: AdapterFile,
    expected: Mapping[str, Tensor],
    model: nn.Module,
    tied: Mapping[str, str] | None = None,
    done: Collection[str] = (),
) -> Fit:
    """Hold a file's header against the tensors (of any device, meta too) that a plan for this model makes.

    `tied` says which modules are adapted along with which: PEFT may write the same tensor for both. The keys in
    `done` have been looked at.

    Raises:
        CheckpointError: a shape differs, or no key fits at all.
    """
    wrong = [
        f"{key}: {list(shape)} in the file, {list(expected[key].shape)} here"
        for key, shape in file.shapes.items()
        if key in expected and expected[key].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        hints = {resize_hint(model, s, tuple(expected[k].shape)) for k, s in file.shapes.items() if k in expected}
        raise CheckpointError(
            f"{file.path} does not fit {type(model).__name__}: {'; '.join(wrong[:3])}{more}. "
            f"Is it for another base?{max(hints)}"
        )
    base = _base_tensors(model)
    extra = [key for key in file.shapes if key not in expected and key not in done]
    copies = {key: base[key] for key in extra if key in base and base[key].shape == file.shapes[key]}
    plain = {key: _leading(key.replace(".modules_to_save.", "."), tied or {}) for key in extra}
    repeated = {
        key: other for key, other in plain.items() if other != key and file.shapes.get(other) == file.shapes[key]
    }
    missing = tuple(key for key in expected if key not in file.shapes)
    fit = Fit(
        frozenset(expected),
        missing,
        tuple(key for key in extra if key not in copies and key not in repeated),
        copies,
        repeated,
    )
    if len(fit.missing) == len(expected):
        raise CheckpointError(
            f"{file.path} does not fit {type(model).__name__}: none of its {len(file.shapes)} keys is expected"
            f"{closest(fit)}."
        )
    return fit


def _leading(key: str, tied: Mapping[str, str]) -> str:
    """The key under which the same tensor stands with the layer that leads."""
    for tied_name, leader in tied.items():
        if key.startswith(f"{PREFIX}{tied_name}."):
            rest = key.removeprefix(f"{PREFIX}{tied_name}.").removeprefix("base_layer.")
            return f"{PREFIX}{leader}.{rest}"
    return key


def check_strict(file: AdapterFile, fit: Fit, strict: bool) -> None:
    """Raise for missing and unexpected tensors, or warn about them.

    Raises:
        CheckpointError: there are such and `strict` is True.
    """
    if not fit.missing and not fit.unexpected:
        return
    message = f"{file.path} does not fit this model: {fit}{closest(fit)}"
    if strict:
        raise CheckpointError(f"{message}.")
    warnings.warn(f"{message}; the rest was loaded.", stacklevel=4)


def closest(fit: Fit) -> str:
    """A guess at what an unexpected key was meant to be."""
    if not fit.unexpected or not fit.missing:
        return ""
    match = nearest(fit.unexpected[0], fit.missing) or fit.missing[0]
    return f" ({fit.unexpected[0]!r} came; {match!r} is expected)"


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Base parameters under every key that PEFT may give them: with and without the wrapper's infix."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = name.replace(".base_layer.", ".")
        owner, _, last = plain.rpartition(".")
        for key in (plain, f"{owner}.base_layer.{last}", f"{owner}.original_module.{last}"):
            tensors[PREFIX + key] = parameter
    return tensors


def read_tensors(file: AdapterFile, fit: Fit) -> dict[str, Tensor]:
    """Read the tensors that are expected, by key.

    Raises:
        CheckpointError: the file is damaged, has changed since its header was read, holds NaN or infinity, or brings
            base weights that are not this model's.
    """
    expected_size = MAX_HEADER_BYTES + sum(math.prod(shape) * 8 for shape in file.shapes.values())
    try:
        tensors = safetensors.torch.load(read_limited(file.path, expected_size))
    except SafetensorError as error:
        raise CheckpointError(f"{file.path} is damaged ({error}).") from None
    if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != dict(file.shapes):
        raise CheckpointError(f"{file.path} changed while it was being read.")
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"{file.path} holds NaN or infinity in {shown(broken, 3)}.")
    for key, parameter in fit.copies_of_base.items():
        if not torch.allclose(tensors[key].float(), parameter.detach().float().cpu(), rtol=1e-2, atol=1e-6):
            raise CheckpointError(
                f"{file.path} brings its own {key!r}, which differs from this model's. Use the base it was trained on."
            )
    for key, other in fit.repeated.items():
        if not torch.equal(tensors[key], tensors[other]):
            raise CheckpointError(f"{file.path}: {key!r} and {other!r} say different things.")
    return {key: tensor for key, tensor in tensors.items() if key in fit.expected}


def load_parts(model: nn.Module, directory: Path, *, strict: bool, allow_base_mismatch: bool) -> tuple[Plan, Parts]:
    """Read an adapter directory and build what it says for this model; the model is only read.

    The shapes are compared before anything is allocated for them, and everything is checked before it is built.

    Raises:
        MinipeftError: see `minipeft.load_adapter`.
    """
    file = open_adapter(directory)
    along = brought(file, model)
    plan = plan_injection(model, along.config, every_pattern=False)
    shapes = build(plan, on_meta=True)
    tied = {site.name: site.tied_to for site in plan.adapters if site.tied_to is not None}
    expected = {key: tensor for key, tensor in shapes.file_tensors(plan).items() if key not in along.rows}
    fit = compare(file, expected, model, tied, done=along.keys)
    if not allow_base_mismatch:
        check_base(file, plan, shapes)
    check_strict(file, fit, strict)
    return plan, build_from(plan, {**read_tensors(file, fit), **along.rows})


def _is_zero(adapter: Adapter) -> bool:
    """Whether the update is a product with a factor of zeros."""
    factors = adapter.factors()
    return factors is not None and not all(factor.any() for factor in factors)


def warn_if_idle(directory: Path, parts: Parts) -> None:
    """Warn about an adapter that was loaded to be used and leaves the model as it is."""
    if not parts.copies and all(map(_is_zero, parts.adapters)):
        warnings.warn(
            f"{directory}: every update is zero, so this adapter changes nothing; was it ever trained?", stacklevel=3
        )
