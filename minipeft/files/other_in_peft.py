"""Where PEFT reads an adapter that fits and computes something else: said when the adapter is saved."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.patterns import is_suffix
from minipeft.ecosystem.transformers_model import input_embedding
from minipeft.errors import shown, warn
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import candidates, wrappers_of


def warn_of_peft(model: nn.Module, config: AdapterConfig, adapter_name: str) -> None:
    """Warn if the adapter is on a table with several names, or trains tokens of tied layers and not of their table."""
    table = input_embedding(model)
    if isinstance(table, AdaptedLayer) and adapter_name in table.parts:
        if not table.adapter(adapter_name).overrides("changed_rows"):
            _warn_of_names(model, table, adapter_name)
    elif table is not None and isinstance(option := getattr(config, "trainable_token_indices", None), Mapping):
        weight = table._parameters.get("weight")
        tied = [n for n, w in wrappers_of(model, adapter_name) if w.base_layer._parameters.get("weight") is weight]
        ids = {entry: tuple(ids) for entry, ids in option.items() if any(is_suffix(entry, name) for name in tied)}
        lost = [entry for entry in ids if entry in tied]  # PEFT takes them for followers of the table
        if lost and len(ids) > 1 and len(set(ids.values())) == 1:
            warn(
                f"saving adapter {adapter_name!r}: PEFT passes over the tokens of {shown(lost)}, since all that trainable_token_indices "
                "names shares one weight. Name the layer of get_input_embeddings() alone: it trains them in all of these layers."
            )


def _warn_of_names(model: nn.Module, table: AdaptedLayer, adapter_name: str) -> None:
    found = next(candidate for candidate in candidates(model).values() if candidate.module is table)
    if len(found.places) > 1:
        first, *others = found.names
        warn(
            f"saving adapter {adapter_name!r}: {first} is {shown(others)} too, as resizing leaves a shared table. PEFT adapts it under "
            "its first name alone, and once the resized base was saved and loaded, these are layers of their own, which this adapter "
            "does not reach. Save that base, load it and adapt it then."
        )
