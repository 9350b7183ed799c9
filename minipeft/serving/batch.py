"""The rows that are being answered, in one batch: joining, one token more for each, leaving.

Rows of different lengths are padded on the left. A row that joins brings keys and values of its own prompt, which are put
below those of the others; when the longest row leaves, so does the padding that only it needed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from minipeft.ecosystem.transformers_model import CACHES
from minipeft.errors import StateError
from minipeft.injection.rows import Rows, tensor_of
from minipeft.injection.rows_of_call import rows_acting, rows_of_call
from minipeft.model import AdaptedModel

FAR = 0.2  # relative distance of logits that no rounding explains; a shift of positions gives 0.6 and more


class Row(Protocol):
    """What is needed of a row: its tokens, and the name that its adapter has in the model."""

    prompt: Sequence[int]
    tokens: list[int]
    adapter: str


class Batch:
    """Rows that use one model, each its own adapter."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rows: list[Any] = []
        self._cache = _new_cache()  # keys and values of shape (rows, heads, width, size of a head)
        self._mask = torch.empty(0, 0, dtype=torch.long, device="cpu")  # (rows, width): 1 for a token, 0 for padding
        self._routing: Rows | None = None
        self._takes = inspect.signature(model.forward).parameters.keys()
        self._takes_cache_as = next((name for name in CACHES if name in self._takes), "past_key_values")

    def join(self, rows: Sequence[Row]) -> Tensor:
        """Run the prompts of more rows; returns the logits of their first tokens, shape (rows, vocabulary)."""
        length = max(len(row.prompt) for row in rows)
        mask = self._tensor([[0] * (length - len(row.prompt)) + [1] * len(row.prompt) for row in rows])
        ids = self._tensor([[0] * (length - len(row.prompt)) + list(row.prompt) for row in rows])
        cache = _new_cache()
        logits = self._run(ids, mask, cache, self._routed(rows, ids))
        self._cache, self._mask = _joined(self._cache, self._mask, cache, mask) if self.rows else (cache, mask)
        self.rows += rows
        self.reroute()
        return logits

    def step(self) -> Tensor:
        """Run the last token of each row; returns the logits of the next ones, shape (rows, vocabulary)."""
        ids = self._tensor([row.tokens[-1:] for row in self.rows])
        self._mask = pad(self._mask, (0, 1), value=1)
        self._routing = self._routing or self._routed(self.rows, ids)
        return self._run(ids, self._mask, self._cache, self._routing)

    def keep(self, rows: Sequence[Row]) -> None:
        """Let all other rows leave."""
        places = [place for place, row in enumerate(self.rows) if row in rows]
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        self.reroute()
        self._mask = self._mask[places]
        unused = int(self._mask.argmax(-1).min()) if places else 0  # columns in which no row has a token
        self._mask = self._mask[:, unused:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[places][..., unused:, :], layer.values[places][..., unused:, :]

    def reroute(self) -> None:
        """Find out anew which adapter is where, since rows or adapters may have changed."""
        self._routing = None

    def check(self) -> None:
        """Try the model on two tokens, and on the same ones after padding.

        Raises:
            StateError: it is not a decoder that remembers keys and values of every token and nothing else, or the padding
                changes what it says.
        """
        ids, cache, cause = self._tensor([[0, 1]]), _new_cache(), None
        padded, mask = self._tensor([[0, 0, 1]] * 2), self._tensor([[1, 1, 1], [0, 1, 1]])
        try:
            alone = self._run(ids, torch.ones_like(ids), cache, None)[0]
            lengths = {tensor.shape[-2] for layer in cache.layers for tensor in (layer.keys, layer.values)}
            beside = self._run(padded, mask, _new_cache(), None)[1]
        except Exception as error:
            lengths, cause = set(), error
        if lengths != {2}:
            raise StateError(
                f"{type(self.model).__name__} cannot be served here: that takes a decoder of transformers which remembers "
                "keys and values of each token and nothing else."
            ) from cause
        if (beside - alone).norm() > FAR * (alone - alone.mean()).norm():
            raise StateError(
                f"{type(self.model).__name__} cannot be served here: a prompt that is padded on the left, as next to a longer one, "
                "gets another answer. Its positions have to come from position_ids or from attention_mask."
            )

    def _tensor(self, values: list[list[int]]) -> Tensor:
        return tensor_of(values, next(self.model.parameters()).device)

    def _routed(self, rows: Sequence[Row], ids: Tensor) -> Rows | None:
        """The adapter of each row, with what layers make of that for as long as the rows stay; None without adapters."""
        if not isinstance(self.model, AdaptedModel):
            return None
        return rows_of_call(self.model, [row.adapter for row in rows], (), {"input_ids": ids}, keeps=True)

    @torch.no_grad()
    def _run(self, ids: Tensor, mask: Tensor, cache: Any, routing: Rows | None) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask, self._takes_cache_as: cache, "use_cache": True}
        if "position_ids" in self._takes:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        with contextlib.nullcontext() if routing is None else rows_acting(self.model, routing):
            logits: Tensor = self.model(**given).logits
        return logits[:, -1].float()


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()  # without a configuration it keeps the whole past, with a sliding window too


def _joined(cache: Any, mask: Tensor, other: Any, other_mask: Tensor) -> tuple[Any, Tensor]:
    """The rows of the second cache below those of the first."""
    width = max(mask.shape[1], other_mask.shape[1])

    def together(one: Tensor, more: Tensor) -> Tensor:
        return torch.cat([pad(part, (0, 0, width - part.shape[-2], 0)) for part in (one, more)])

    for layer, more in zip(cache.layers, other.layers, strict=True):
        layer.keys, layer.values = together(layer.keys, more.keys), together(layer.values, more.values)
    return cache, torch.cat([pad(part, (width - part.shape[1], 0)) for part in (mask, other_mask)])
