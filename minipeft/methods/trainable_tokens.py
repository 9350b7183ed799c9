"""Trainable tokens: the rows of a few tokens in an embedding, and in an output head tied to it."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.options import integer
from minipeft.ecosystem.transformers_model import input_embedding
from minipeft.ecosystem.wrapper_names import named_modules, unwrapped_name
from minipeft.errors import ConfigError, TargetError, told
from minipeft.kernels.functional import whole
from minipeft.layers.base import LayerOps, takes_vectors
from minipeft.layers.uncalled import UncalledOps
from minipeft.methods.base import Adapter
from minipeft.methods.swapping import copy_tensors, unlike
from minipeft.registry.registry import register_method

MAX_TABLES = 100  # a model has one or two, some a few more; each is looked for in all its modules


@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(AdapterConfig):
    """Options of trainable tokens, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        token_indices: ids of the tokens whose rows train, each once.
        target_modules: None: the model's input embedding.
        init_weights: True: start from the rows as they are, which leaves the model as it is. False: normal ones.
    """

    method: ClassVar[str] = "trainable_tokens"
    not_in_files: ClassVar[frozenset[str]] = frozenset(
        {"exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
    )

    token_indices: Sequence[int] = ()
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("token_indices", token_ids("token_indices", self.token_indices))

    def default_modules(self, model: nn.Module) -> Sequence[str] | None:
        embedding = input_embedding(model)
        names = [name for name, module in named_modules(model) if module is embedding]
        if not names:
            raise TargetError(
                f"{type(model).__name__} names no input embedding (get_input_embeddings), so say by name which module "
                "holds the tokens' rows."
            )
        return names


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """A non-empty list of token ids, each once, as a tuple in its order; raises ConfigError if it is not that."""
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(
            f"{name} must be a non-empty list of token ids such as [50257, 50258], not {told(value, 100)}."
        )
    ids = tuple(integer(f"{name}[{place}]", index, at_least=0) for place, index in enumerate(value))
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{name} has the token {Counter(ids).most_common(1)[0][0]} more than once; name each once.")
    return ids


def token_option(name: str, value: object) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """Check an option of another method that also trains tokens: ids for the input embedding, or module name -> ids.

    Raises ConfigError if it is neither, nor None.
    """
    if not isinstance(value, Mapping):
        return None if value is None else token_ids(name, value)
    if not value or not all(isinstance(module, str) and module for module in value):
        raise ConfigError(f"{name} must map module names to lists of token ids, not {told(value, 100)}.")
    if len(value) > MAX_TABLES:
        raise ConfigError(f"{name} names {len(value):,} modules; {MAX_TABLES} are allowed.")
    return {unwrapped_name(module): token_ids(f"{name}[{told(module)}]", ids) for module, ids in value.items()}


def tokens_beside(option: Sequence[int] | Mapping[str, Sequence[int]] | None) -> list[tuple[str, AdapterConfig]]:
    """The companions (see `AdapterConfig.companions`) for such an option; the prefix is PEFT's."""
    chosen = option.items() if isinstance(option, Mapping) else [] if option is None else [(None, option)]
    return [
        ("token_adapter.", TrainableTokensConfig(target_modules=None if name is None else [name], token_indices=ids))
        for name, ids in chosen
    ]


@register_method("trainable_tokens")
class TrainableTokens(Adapter):
    """Row t of the table is replaced for each chosen token t: ``W[t] = trainable_tokens_delta[i]``, as in PEFT.

    `trainable_tokens_delta` is (tokens, width), in the order of the configuration. The name is PEFT's; it holds rows, not
    differences, so loading it into a table that was resized again, with other random rows, gives the same result. A
    token's row is a row of W in an output head and a column in an embedding. The changes add to those of other adapters.

    Only these rows are computed; PEFT copies the whole table in every forward pass.
    """

    config_class = TrainableTokensConfig
    runs_base = True
    original: Tensor
    indices: Tensor
    ascending: Tensor
    order: Tensor

    def __init__(self, base: nn.Module, ops: LayerOps, config: TrainableTokensConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        if not ops.is_embedding and (isinstance(ops, UncalledOps) or not takes_vectors(ops)):
            raise ConfigError(
                f"{type(base).__name__} has no rows of tokens: they are trained in embeddings and linear output heads."
            )
        self.is_embedding = ops.is_embedding
        rows, ids = self._table(ops.read_weight(base).detach()), tuple(config.token_indices)
        self.ids = ids
        beyond = max(ids) - len(rows) + 1
        if beyond > 0:
            raise ConfigError(
                f"token {max(ids)} is beyond the {len(rows)} rows of {type(base).__name__}. Call "
                f"model.resize_token_embeddings({max(ids) + 1}) first, as when the tokens were added."
            )
        for name in ("indices", "ascending", "order", "original"):
            self.register_buffer(name, None, persistent=False)
        self.base_loaded(base, ops)
        start = self.original if config.init_weights or rows.is_meta else torch.randn_like(self.original)
        self.trainable_tokens_delta = nn.Parameter(start.clone())

    @torch.no_grad()
    def base_loaded(self, base: nn.Module, ops: LayerOps) -> None:
        weight = whole(ops.read_weight(base))
        self.indices = torch.tensor(self.ids, device=weight.device)
        self.ascending, self.order = (self.indices, self.indices) if weight.is_meta else self.indices.sort()
        # Stored, since another adapter may be merged into the table later.
        self.original = self._table(weight)[self.indices].clone()

    def misfit(self, other: Self) -> str:
        return unlike(self, other, {"ids"})

    def take(self, other: Self) -> None:
        copy_tensors(self, other)
        self.ids = other.ids

    def _table(self, weight: Tensor) -> Tensor:
        """The canonical weight with one token per row."""
        return weight.t() if self.is_embedding else weight

    def change(self) -> Tensor:
        """What is added to the tokens' rows, (tokens, width)."""
        return self.trainable_tokens_delta - self.original.to(self.trainable_tokens_delta.dtype)

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Tensor | None) -> Tensor:
        fresh = y is None and isinstance(ops.linear_weight(base, x), Tensor)
        if y is None:
            y = ops.call(base, x)
        assert isinstance(y, Tensor)
        if not ops.is_embedding:
            more = ops.scaled(base, ops.project_in(base, x, self.change().to(x.dtype))).to(y.dtype)
            # In place if nothing else holds this output: a head's is the largest array of all.
            return y.index_add_(-1, self.indices, more) if fresh else y.index_add(-1, self.indices, more)
        change = self.change().to(y.dtype)
        last = len(change)
        place = torch.searchsorted(self.ascending, x.to(self.ascending.dtype)).clamp(max=last - 1)
        slot = torch.where(self.ascending[place] == x, self.order[place], last)
        more = F.embedding(slot, F.pad(change, (0, 0, 0, 1)), padding_idx=last)
        return y + ops.scaled(base, more)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        merged = weight.clone()
        rows, wanted = self._table(merged), self.trainable_tokens_delta.to(weight.dtype)
        now, original = rows[self.indices], self.original.to(weight.dtype)
        # Exactly the trained row, if no other adapter has changed it.
        rows[self.indices] = torch.where(now == original, wanted, now + (wanted - original))
        return merged, bias

    def delta(self, weight: Tensor) -> Tensor | None:
        update = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        self._table(update)[self.indices] = self.change().to(update.dtype)
        return update

    def changed_rows(self) -> tuple[Tensor, Tensor]:
        return self.indices, self.change()

    def for_tied(self, base: nn.Module, ops: LayerOps) -> Self:
        # With the same dictionaries of parameters and buffers, so a tensor put into one is in both.
        twin = copy.copy(self)
        twin.is_embedding = ops.is_embedding
        return twin

    def untouched(self, weight: Tensor, brought: Collection[int] = ()) -> Tensor:
        """The widest run of rows between those of the tokens."""
        table = self._table(weight)
        ends = [-1, *sorted({*self.ids, *brought}), len(table)]
        start, end = max(itertools.pairwise(ends), key=lambda pair: pair[1] - pair[0])
        return self._table(table[start + 1 : end])
