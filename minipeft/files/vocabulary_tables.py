"""The two tables of a vocabulary, input embedding and output head, and how many rows the base on disk has."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from minipeft.files.base_checkpoint import base_config, stored_rows
from minipeft.injection.module_tree import outside_adapters
from minipeft.injection.wrapper import innermost
from minipeft.transformers_model import input_embedding, is_from_checkpoint, output_head, vocabulary_size


class Table(NamedTuple):
    """One table: the module in the model, perhaps a wrapper, and its weight (tokens, width)."""

    module: nn.Module
    weight: Tensor


def tables(model: nn.Module) -> dict[str, Table]:
    """The tables of a transformers model by name; of two that share a weight, only the first."""
    found: dict[int, tuple[str, Table]] = {}
    for module in (input_embedding(model), output_head(model)):
        weight = None if module is None else getattr(innermost(module), "weight", None)
        if module is None or not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            continue
        name = next((name for name, other in outside_adapters(model) if other is module), None)
        if name is not None:
            found.setdefault(id(weight), (name, Table(module, weight)))
    return dict(found.values())


def base_vocabulary(model: nn.Module) -> int | None:
    """``vocab_size`` in the ``config.json`` of the base that the model was loaded from, if that is on this machine."""
    values = base_config(model)
    for part in (values.get("text_config"), values):
        size = part.get("vocab_size") if isinstance(part, dict) else None
        if isinstance(size, int):
            return size
    return None


def base_rows(model: nn.Module, name: str, table: Table) -> int | None:
    """How many rows of a table the base has, if that is on this machine: perhaps more than its vocabulary.

    mllama has 8 for images besides, and some tables are padded. The checkpoint says so; without it, a table that is
    still the one that was loaded, for a vocabulary of unchanged size, was not resized.
    """
    size = base_vocabulary(model)
    if size is None or len(table.weight) <= size:
        return size
    stored = stored_rows(model, name, table.weight.shape[1])
    if stored is not None:
        return max(stored, size)
    untouched = isinstance(table.weight, nn.Parameter) and is_from_checkpoint(table.weight)
    return len(table.weight) if untouched and vocabulary_size(model) == size else size
