"""What PEFT repeats in a file for layers that share an adapter or a trained copy (``ensure_weight_tying``)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from minipeft.config import AdapterConfig
from minipeft.injection.build import PREFIX
from minipeft.injection.module_tree import wrappers_of
from minipeft.injection.modules_to_save import SavedModule

# The factors of a head that is tied to an embedding -> those of the embedding, of which each is the transpose.
TRANSPOSED = {".lora_A.weight": ".lora_embedding_B", ".lora_B.weight": ".lora_embedding_A"}


def followers(model: nn.Module, config: AdapterConfig, adapter_name: str) -> dict[str, str]:
    """The layers that share what another one has: name -> name of that other one; for `ensure_weight_tying` only."""
    if not config.ensure_weight_tying:
        return {}
    first_of: dict[frozenset[int], str] = {}
    shared = {}
    for name, wrapper in sorted(wrappers_of(model, adapter_name), key=lambda pair: _follows(pair[1], adapter_name)):
        weights = frozenset(map(id, _shareable(wrapper, wrapper.adapters[adapter_name])))
        first = first_of.setdefault(weights, name) if weights else name
        if first != name:
            shared[name] = first
    return shared


def _shareable(wrapper: nn.Module, part: nn.Module) -> list[Tensor]:
    weight = part._parameters.get("weight") if isinstance(wrapper, SavedModule) else None
    return [weight] if weight is not None else list(part.parameters())


def _follows(wrapper: nn.Module, adapter_name: str) -> bool:
    return adapter_name in getattr(wrapper, "tied_adapters", ()) or getattr(wrapper, "only", None) == ()


def with_repeats(tensors: Mapping[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of an adapter, and under the names of its followers what PEFT writes for those."""
    more = {}
    for name, first in shared.items():
        pairs = [(new, old, True) for new, old in TRANSPOSED.items()]
        pairs += [(part, part, False) for part in (".lora_embedding_A", ".lora_embedding_B", ".weight")]
        for new, old, turn in pairs:
            tensor = tensors.get(f"{PREFIX}{first}{old}")
            if tensor is not None:
                more[f"{PREFIX}{name}{new}"] = tensor.t() if turn else tensor
    return {**tensors, **more}
