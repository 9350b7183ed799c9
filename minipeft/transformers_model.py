"""The two ends of a language model, where it names them as transformers' models do; else None."""

from __future__ import annotations

from torch import nn


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that ``get_input_embeddings`` gives, as it is wrapped."""
    return _given_by(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that ``get_output_embeddings`` gives, as it is wrapped."""
    return _given_by(model, "get_output_embeddings")


def _given_by(model: nn.Module, method: str) -> nn.Module | None:
    get = getattr(model, method, None)
    try:
        module = get() if callable(get) else None
    except NotImplementedError:  # what transformers raises for a model without one
        return None
    return module if isinstance(module, nn.Module) else None
