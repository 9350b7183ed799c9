"""The one comparison of a file with the adapter it is for, used when an adapter is loaded, restored or trained further."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import config_from_dict
from minipeft.ecosystem.wrapper_names import named_parameters, unwrapped_name
from minipeft.errors import CheckpointError, nearest, printable, shown, told, warn
from minipeft.files.base_samples import check_samples
from minipeft.files.extra_tensors import find_extras
from minipeft.files.format import DTYPES, FLOATS, PROVENANCE, AdapterFile
from minipeft.files.new_rows import resize_hint
from minipeft.files.not_an_adapter import tensors_named

# Options that only say which modules are meant, as the keys of a file do. What PEFT writes there means more and less than
# here: endings of names, and heads that the model does not have.
WHICH_MODULES = {
    "ensure_weight_tying", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "target_modules"
}  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """The adapter that a file's values are for."""

    model: nn.Module  # has the adapter, or will have it
    tensors: Mapping[str, Tensor]  # what the file must hold, by key; on any device, meta too
    base: Mapping[str, list[float]]  # samples of the base weights, by module. Empty: do not compare the base.
    # As `minipeft.files.save.file_config` returns it. None: the adapter is built from the file's own.
    config: Mapping[str, Any] | None = None
    # Training resumes from these values: dtypes must be equal too, and base weights equal to 4 digits
    exact: bool = False
    # The name of a tied layer -> the layer whose adapter it shares
    tied: Mapping[str, str] = field(default_factory=dict)
    done: Collection[str] = ()  # keys of the file that have been compared already
    base_advice: str = ""  # what to do about another base


def read_values(file: AdapterFile, expected: Expected, *, strict: bool = True) -> dict[str, Tensor]:
    """Compare a file with the adapter it is for, and read its values by key; tensors are read last.

    If not `strict`, missing and unexpected keys are only warned about, and missing values are left out.

    Raises:
        CheckpointError: the configuration, a key, a shape or the base differs, or the file is damaged or not finite.
    """
    file = _unwrapped(file, expected)
    _compare_config(file, expected)
    _compare_shapes(file, expected)
    check_samples(file, expected.base, exact=expected.exact, advice=expected.base_advice)
    others = [key for key in file.shapes if key not in expected.tensors and key not in expected.done]
    extras = find_extras(file, [] if expected.exact else others, expected.tied, expected.model)
    _compare_keys(file, expected, [key for key in others if key not in extras], strict)
    wanted = {*expected.tensors, *extras.to_read}
    values = file.read([key for key in file.shapes if key in wanted])
    extras.check(values)
    return {key: value for key, value in values.items() if key in expected.tensors}


def _unwrapped(file: AdapterFile, expected: Expected) -> AdapterFile:
    """The file under the names that the model has without wrappers, if it was saved with theirs."""
    names = "\n".join(file.shapes)  # all at once: most files have none
    if unwrapped_name(names) == names:
        return file
    base = {name if name in expected.base else unwrapped_name(name): row for name, row in file.base.items()}
    file = file.renamed(lambda key: key if key in expected.tensors else unwrapped_name(key))
    return replace(file, base=base)


def _compare_config(file: AdapterFile, expected: Expected) -> None:
    if expected.config is None:
        return
    config = config_from_dict(expected.config)
    there, here = file.config.to_dict(), config.to_dict()
    compared = here.keys() - PROVENANCE - config.other_keys.keys() - (set() if file.is_own else WHICH_MODULES)
    differ = [key for key in here if key in compared and _in_order(here[key]) != _in_order(there.get(key))]
    if differ:
        said = [f"{key} is {told(there.get(key), 100)} there and {told(here[key], 100)} here" for key in differ[:3]]
        raise CheckpointError(f"{file.path.parent} was saved with another configuration: {'; '.join(said)}.")


def _in_order(value: Any) -> Any:
    """A list of names sorted: PEFT writes a set, in any order."""
    return sorted(value) if isinstance(value, list) and all(isinstance(entry, str) for entry in value) else value


def _compare_shapes(file: AdapterFile, expected: Expected) -> None:
    common = [key for key in file.shapes if key in expected.tensors]
    pairs = [(key, file.shapes[key], tuple(expected.tensors[key].shape)) for key in common]
    misfit = f"{file.path} does not fit {type(expected.model).__name__}"
    if not common:
        closest = _closest(list(file.shapes), list(expected.tensors))
        what = tensors_named(file.shapes, [name for name, _ in named_parameters(expected.model)])
        raise CheckpointError(f"{misfit}: none of its {len(file.shapes)} keys is expected{closest}.{what}")
    wrong = [(key, there, here) for key, there, here in pairs if there != here]
    if wrong:
        said = [
            f"{printable(key, 200)}: {told(list(there), 100)} in the file, {list(here)} here"
            for key, there, here in wrong[:3]
        ]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        hint = max(resize_hint(expected.model, there, here) for _, there, here in wrong[:3])
        raise CheckpointError(f"{misfit}: {'; '.join(said)}{more}. Is it for another base?{hint}")
    for key in common:
        if DTYPES[file.dtypes[key]] != expected.tensors[key].dtype:
            _check_conversion(file, key, expected.tensors[key].dtype, exact=expected.exact)


def _check_conversion(file: AdapterFile, key: str, here: torch.dtype, *, exact: bool) -> None:
    """Values are converted between floating point types, unless `exact`; a counter (BatchNorm has one) is an integer."""
    there = DTYPES[file.dtypes[key]]
    if here.is_floating_point and not there.is_floating_point:
        raise CheckpointError(
            f"{file.path}: {key!r} is {file.dtypes[key]}; adapters are floating point ({', '.join(FLOATS)})."
        )
    if exact or not here.is_floating_point:
        raise CheckpointError(f"{file.path}: {key} is {there} there and {here} here.")


def _compare_keys(file: AdapterFile, expected: Expected, unexpected: list[str], strict: bool) -> None:
    missing = [key for key in expected.tensors if key not in file.shapes]
    if not missing and not unexpected:
        return
    lists = (("missing", missing), ("unexpected", unexpected))
    said = "; ".join(f"{what} {shown(keys)}" for what, keys in lists if keys)
    message = f"{file.path} does not fit this model: {said}{_closest(unexpected, missing)}"
    if strict:
        raise CheckpointError(f"{message}.{_lost_biases(file, missing, unexpected)}")
    warn(f"{message}; the rest was loaded.")


def _lost_biases(file: AdapterFile, missing: list[str], unexpected: list[str]) -> str:
    """What to do about a file that lacks the biases alone."""
    lost = missing and not unexpected and all(key.endswith(".bias") for key in missing)
    if file.is_own or not lost or getattr(file.config, "bias", None) != "lora_only":
        return ""
    return " PEFT 0.7 to 0.19.0 left the biases of bias='lora_only' out of its files; strict=False loads what there is."


def _closest(unexpected: list[str], missing: list[str]) -> str:
    """A guess at what an unexpected key was meant to be."""
    if not unexpected or not missing:
        return ""
    match = nearest(unexpected[0], missing) or missing[0]
    return f" (found {told(unexpected[0], 200)}; expected {told(match, 200)})"
