"""LoRA+: B learns faster than A (Hayou et al., 2024, arXiv:2402.12354)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from minipeft.config.options import number
from minipeft.errors import StateError, shown
from minipeft.injection.module_tree import adapted_layers

# PEFT's file keys of a pair of factors (down, up), for any method.
PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
GROUPS = ("lora_A", "lora_B", "vectors", "lora_embedding")


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0, *, lr_embedding: float = 1e-6
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: B learns at ``ratio * lr``, A at `lr`.

    Every trainable parameter is in exactly one group, in the model's order. The groups, by ``"name"``:

    - ``"lora_A"``, at `lr`: down factors, matrices of modules trained in full, and rows of trained tokens;
    - ``"lora_B"``, at ``ratio * lr``: up factors;
    - ``"vectors"``, at ``ratio * lr`` without decay: biases, norms, magnitudes; the rate is that of the authors' code and
      of ``peft.optimizers.create_loraplus_optimizer``;
    - ``"lora_embedding"``, at `lr_embedding`: both factors of adapted embeddings.

    Args:
        model: adapted with LoRA, or with another method that has a pair of factors.
        lr: learning rate of A.
        ratio: learning rate of B divided by that of A, at least 1. The paper recommends 16 if B starts at zero.
        weight_decay: of every group except ``"vectors"``.
        lr_embedding: learning rate of adapted embeddings; PEFT calls it ``loraplus_lr_embedding``.

    Returns:
        The groups that are not empty, with ``"name"``, ``"params"``, ``"lr"`` and ``"weight_decay"``.

    Raises:
        ConfigError: a number is out of range.
        StateError: no adapter trains, or one that trains has no pair of factors.
    """
    number("lr", lr, above=0)
    number("ratio", ratio, at_least=1)
    number("weight_decay", weight_decay, at_least=0)
    number("lr_embedding", lr_embedding, above=0)
    roles = dict(_factors(model))
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[roles.get(id(parameter)) or ("vectors" if parameter.ndim == 1 else "lora_A")].append(parameter)
    if not roles:
        raise StateError(
            "LoRA+ needs a LoRA adapter that trains, and no adapter of this model trains; see is_trainable and set_adapter."
        )
    rates = {"lora_A": lr, "lora_B": lr * ratio, "vectors": lr * ratio, "lora_embedding": lr_embedding}
    decay = {name: 0.0 if name == "vectors" else weight_decay for name in GROUPS}
    return [
        {"name": name, "params": parameters, "lr": rates[name], "weight_decay": decay[name]}
        for name, parameters in groups.items()
        if parameters
    ]


def _factors(model: nn.Module) -> Iterator[tuple[int, str]]:
    """(id, group) of every factor of the adapters that train."""
    for path, layer in adapted_layers(model):
        for adapter_name in layer.adapters:
            trains = any(parameter.requires_grad for parameter in layer.trainable_parameters(adapter_name))
            if not trains or layer.adapter(adapter_name).key_prefix:  # rows of trained tokens are plain matrices
                continue
            tensors = {key.partition(".")[0]: tensor for key, tensor in layer.file_tensors(adapter_name).items()}
            pair = next((pair for pair in PAIRS if tensors.keys() >= set(pair)), None)
            if pair is None:
                raise StateError(
                    f"{path}: LoRA+ needs a pair lora_A, lora_B, and adapter {adapter_name!r} trains {shown(tensors)}."
                )
            is_embedding = pair != PAIRS[0]
            for name, plain_name in zip(pair, PAIRS[0], strict=True):
                yield id(tensors[name]), "lora_embedding" if is_embedding else plain_name
