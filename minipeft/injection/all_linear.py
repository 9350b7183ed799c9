"""``target_modules="all-linear"``: every linear layer but the output head; ``"all-linear-text"``: those that read text.

Those that cannot be adapted are named in one warning, since the user asked for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from minipeft.ecosystem.transformers_model import has_other_output, knows_its_head, output_head, text_part
from minipeft.errors import TargetError
from minipeft.injection.module_tree import Candidate
from minipeft.layers.base import FLOAT_DTYPES, layer_ops
from minipeft.layers.uncalled import matrices
from minipeft.registry import registry

HEAD_NAMES = ("score", "classifier", "qa_outputs")
KINDS = 8  # that a warning names
UNREADABLE = "no weight that minipeft can read; see register_layer"


def all_linear(
    model: nn.Module, found: Mapping[str, Candidate], eligible: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """The linear layers among these names; and the modules with linear maps that cannot be adapted, with the reason."""
    head, names_its_head = output_head(model), knows_its_head(model)
    chosen, left_out = [], {}
    for name in eligible:
        candidate = found.get(name)  # a module's other names are the same module
        if candidate is None or candidate.module is head:
            continue
        if names_its_head and name.rpartition(".")[2] in HEAD_NAMES and head is None:
            continue
        ops = layer_ops(candidate.base)
        if ops is not None and ops.in_all_linear:
            chosen.append(name)
        elif (reason := _why_left_out(candidate)) is not None:
            left_out[name] = reason
    return chosen, left_out


def of_text(model: nn.Module, eligible: Iterable[str]) -> list[str]:
    """Those of these names that are in the part of a model of several modalities that reads and writes text.

    The model says which part that is; for a model of text it is all of it. Raises TargetError if there is
    none.
    """
    part = text_part(model)
    if part is None:
        raise TargetError(
            f"target_modules='all-linear-text' asks for the part of {type(model).__name__} that reads text, and it names none; "
            "'all-linear' takes all of it."
        )
    inside = tuple(f"{name}." for name, module in model.named_modules(remove_duplicate=False) if module is part)
    return list(eligible) if part is model else [name for name in eligible if name.startswith(inside)]


def layers_left_out(reasons: Mapping[str, str], found: Mapping[str, Candidate]) -> str:
    """The modules that were left out, by name and reason: a few words for all of one kind."""
    kinds: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kinds.setdefault(f"{type(found[name].base).__name__} ({reason})", []).append(name)
    said = [f"{len(names)} {kind} such as {names[0]}" for kind, names in kinds.items()]
    more = [f"{len(said) - KINDS} more kinds"] if len(said) > KINDS else []
    return "; ".join(said[:KINDS] + more)


def _why_left_out(candidate: Candidate) -> str | None:
    """Why a module that is a linear map, or holds some, is not adapted; None for any other module."""
    base = candidate.base
    if isinstance(base, nn.MultiheadAttention):
        return "read and not called; target_modules can name it"
    if any(isinstance(parent, nn.MultiheadAttention) for parent, _ in candidate.places):
        return None  # it goes with its parent
    if _is_linear(base) and layer_ops(base) is None:
        return _weight_of(base)
    if "router" in type(base).__name__.lower() and (own := matrices(base)):
        return f"target_parameters can name {' and '.join(own)}"
    return why_experts_are_left_out(base)


def why_experts_are_left_out(base: nn.Module) -> str | None:
    """The reason for a module that holds the experts of a mixture in tensors of its own; None for any other module."""
    if "expert" not in type(base).__name__.lower() or not _holds_matrices(base):
        return None
    own = matrices(base)
    return f"fused; target_parameters can name {' and '.join(own)}" if own else f"fused; {UNREADABLE}"


def _holds_matrices(base: nn.Module) -> bool:
    own = (*base._parameters.values(), *base._buffers.values())
    return any(tensor is not None and tensor.ndim >= 2 for tensor in own)


def _is_linear(base: nn.Module) -> bool:
    """Whether a module has a weight and is a linear layer, by its type or name."""
    known = any(ops.in_all_linear for _, ops in registry.layer_candidates(type(base)))
    named = "linear" in type(base).__name__.lower() and not base._modules
    return known or (named and _holds_matrices(base))


def _weight_of(base: nn.Module) -> str:
    weight = base._parameters.get("weight")
    if parametrize.is_parametrized(base) or (weight is None and isinstance(vars(base).get("weight"), Tensor)):
        return "its weight is computed, by weight_norm, prune or the like"
    if weight is None:
        return UNREADABLE
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}; see register_layer"
    if weight.layout is not torch.strided:
        return f"its weight is {str(weight.layout).removeprefix('torch.')}"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if has_other_output(base):
        return "its output is not its product; target_parameters can name its weight"
    return "no LayerOps for it; see register_layer"
