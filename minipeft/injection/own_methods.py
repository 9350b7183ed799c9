"""The model's own methods where they have to take its adapters into account: calls, training mode, recomputation, vocabulary."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config.adapter_config import AdapterConfig
from minipeft.ecosystem.packages import is_from
from minipeft.ecosystem.transformers_model import input_embedding, output_head, vocabulary_tables
from minipeft.errors import UNCHANGED, StateError, all_or_nothing, shown
from minipeft.injection.attach import hold_norms
from minipeft.injection.checkpointing import let_checkpoints_train, training_setter
from minipeft.injection.diffusers_verbs import refuse_diffusers_verbs
from minipeft.injection.methods_without_rows import refuse_rows
from minipeft.injection.module_tree import wrappers
from minipeft.injection.row_order import learn_order
from minipeft.injection.rows import Rows, rows_now
from minipeft.injection.rows_of_call import note_length, rows_acting, rows_of_call
from minipeft.injection.state import STATE, AdapterState, state_of
from minipeft.injection.watch import watched_call
from minipeft.injection.wrapper import innermost

MERGED = "merged_adapters"  # the key of the merged adapters' names, as codes, in a state


class Configurations(dict[str, AdapterConfig]):
    """Configurations by adapter, to read. PEFT adds an adapter by writing here, at the start of ``peft.get_peft_model``.

    diffusers then takes out what it could not add, and would report that it is not here.
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Raise StateError: see above."""
        raise StateError(
            "PEFT cannot add an adapter to a model that minipeft has adapted. Use model.add_adapter(name, config) or "
            "load_adapter(folder, name), or give PEFT, or a trainer with peft_config=, the plain base."
        )

    __setitem__ = update
    pop = update  # type: ignore[assignment]


class OwnMethods(nn.Module):
    """The part of `minipeft.AdaptedModel` that extends methods of torch and transformers."""

    def __init_subclass__(cls) -> None:
        """The ``forward`` of an adapted class, called directly, takes ``adapter_names`` too; transformers' would ignore it.

        What is built from that class, as by its ``from_pretrained``, has no adapter, so it is of the plain class. The plain
        class's own ``__init_subclass__`` is not called, see `minipeft.python.class_swap.mixed_class`.
        """
        *first, plain = cls.__bases__
        if first and issubclass(first[-1], OwnMethods):  # `mixed_class`, and not the mixin itself
            cls.__init__ = _init_of_plain(plain)  # type: ignore[method-assign]
            if cls.forward is not nn.Module.forward:
                cls.forward = _forward_by_row(cls)
            if is_from(cls, "transformers"):
                refuse_rows(cls)
            if is_from(cls, "diffusers"):
                refuse_diffusers_verbs(cls)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """What transformers' Trainer asks of a quantized model before it trains it: whether it has adapters.

        True for quantized models only, since transformers takes it for PEFT's adapters elsewhere.
        """
        return bool(getattr(self, "is_quantized", False)) and STATE in self.__dict__

    def train(self, mode: bool = True) -> Self:
        """As usual, but norms whose running statistics belong to the frozen base stay in evaluation mode.

        Their statistics would move in training, and no adapter file holds them: see `minipeft.injection.base_state`.
        """
        super().train(mode)
        if (state := self.__dict__.get(STATE)) is not None:
            state.held = set()
            hold_norms(self)
        return self

    @property
    def merged_adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are merged into the base; torch looks for each key of a state under its name."""
        state: AdapterState | None = self.__dict__.get(STATE)
        return () if state is None else state.merged

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As usual; while adapters are merged, one more tensor says which of them the base's values contain.

        It is a tensor since `accelerate.save_state` writes safetensors, and loses metadata.
        """
        values = super().state_dict(*args, **kwargs)
        if self.merged_adapters:
            values[kwargs.get("prefix", "") + MERGED] = torch.tensor(list(",".join(self.merged_adapters).encode()))
        return values

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As usual, for a state that was taken with the same adapters merged as here.

        Raises:
            StateError: it was taken with others, so an adapter would act twice, or not at all; nothing is changed.
        """
        state: AdapterState | None = self.__dict__.get(STATE)
        if state is not None:
            codes = state_dict.pop(prefix + MERGED, None)
            there = [] if codes is None else bytes(codes.int().tolist()).decode().split(",")
            if set(there) != set(state.merged):
                raise StateError(
                    f"load_state_dict: {shown(there)} was merged when this state was taken, and "
                    f"{shown(state.merged)} is merged here. Call unmerge_adapter() before both. {UNCHANGED}"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call. The first one with an adapter also finds out whether the adapter acts everywhere.

        Raises:
            StateError: in training with `minipeft.hf.AdapterTrainer` or `Updater`, a layer does not use its adapter.
                Elsewhere it is a warning.
            MinipeftError: `adapter_names` is given, and rows of the batch cannot use different adapters so; see
                `minipeft.injection.rows_of_call`.
        """
        state: AdapterState | None = self.__dict__.get(STATE)
        if state is not None and kwargs.get("adapter_names") is not None:
            if not torch.compiler.is_exporting():
                return self._call_by_row(args, kwargs)
            with self._each_row(args, kwargs):
                return self(*args, **kwargs)
        kwargs.pop("adapter_names", None)
        if OwnMethods not in type(self).__mro__:  # it was unloaded, and `torch.compile` holds this method from before
            return type(self).__call__(self, *args, **kwargs)
        if state is None:
            return super().__call__(*args, **kwargs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            let_checkpoints_train(self, state.switch)  # a part or a wrapper may have begun to checkpoint
        if (rows := rows_now(state.switch)) is not None:
            note_length(self, rows, args, kwargs)
            if not torch.compiler.is_compiling():  # a graph is for any rows, and `_call_by_row` has found out
                self._learn_order(rows, args, kwargs)
        elif state.switch.trained_by_row and torch.is_grad_enabled():
            state.switch.trained_by_row = False
        if torch.compiler.is_compiling() or not state.unwatched:  # in this order, a graph does not depend on the second
            return super().__call__(*args, **kwargs)
        return watched_call(self, super().__call__, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _learn_order(self, rows: Rows, args: Any, kwargs: Any) -> None:
        switch = state_of(self).switch
        count = len(rows.names)
        matters = len(rows.uses) > 1 and (rows.length in (None, count, count * rows.times) or switch.order_unclear)
        if matters and not switch.order_known:
            switch.order_known = learn_order(self, rows, super()._call_impl, args, kwargs)

    # Not compiled itself, so that other names need no other graph.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def _call_by_row(self, args: Any, kwargs: Any) -> Any:
        with self._each_row(args, kwargs) as rows:
            note_length(self, rows, args, kwargs)
            self._learn_order(rows, args, kwargs)
            return self(*args, **kwargs)

    @contextlib.contextmanager
    def _each_row(self, args: Any, kwargs: Any) -> Iterator[Rows]:
        """Take ``adapter_names`` out of `kwargs`; within the context each row uses its own adapter."""
        rows = rows_of_call(self, kwargs.pop("adapter_names"), args, kwargs)
        with rows_acting(self, rows):
            yield rows
        if torch.is_grad_enabled():
            state_of(self).switch.trained_by_row = True

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter of this name, as in torch; for an adapted layer its base layer's, which is what tying weights needs."""
        parameter: nn.Parameter = _without_adapters(self, super().get_parameter)(target)
        return parameter

    @property
    def tie_weights(self) -> Any:
        """Transformers' method, which ties what the base owns; a model that lacks it lacks it here, too."""
        return _without_adapters(self, super().tie_weights)  # type: ignore[misc]

    @property
    def _set_gradient_checkpointing(self) -> Any:
        """What transformers has under this name; a model that lacks it lacks it here, too."""
        return training_setter(self, super()._set_gradient_checkpointing)  # type: ignore[misc]

    @all_or_nothing
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Transformers' method, for a model whose embedding and output head have no adapter and no trained copy.

        Raises:
            StateError: one of them has, and the size would change: what it holds fits the old one.
        """
        parent: Any = super()
        embedding, head = input_embedding(self), output_head(self)
        taken = [n for table in vocabulary_tables(self) for n in _adapted_with(self, table)]
        if not taken or embedding is None:
            return parent.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        sizes = {_rows(table) for table in (embedding, head) if table is not None}
        wanted = _rows(embedding) if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted = math.ceil(wanted / pad_to_multiple_of) * pad_to_multiple_of
        if sizes == {wanted} or {new_num_tokens, pad_to_multiple_of} == {None}:  # transformers would freeze the wrapper
            return embedding
        raise StateError(
            f"resize_token_embeddings: {shown(dict.fromkeys(taken))} is adapted or trained in full at its present size of "
            f"{shown(sorted(sizes))} rows. Resize the base first, then adapt it or load the adapter."
        )

    @all_or_nothing
    def set_input_embeddings(self, value: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Transformers' method, for a table that has no adapter and no trained copy.

        Raises:
            StateError: it has, and they would be lost with it.
        """
        _check_replaceable(self, input_embedding(self), value)
        parent: Any = super()
        return parent.set_input_embeddings(value, *args, **kwargs)

    @all_or_nothing
    def set_output_embeddings(self, new_embeddings: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As `set_input_embeddings`, for the output head."""
        _check_replaceable(self, output_head(self), new_embeddings)
        parent: Any = super()
        return parent.set_output_embeddings(new_embeddings, *args, **kwargs)


def _without_adapters(model: nn.Module, method: Any) -> Any:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        state = model.__dict__.get(STATE)
        with state.switch.off() if state is not None else contextlib.nullcontext():
            return method(*args, **kwargs)

    return call


def _init_of_plain(plain: type[nn.Module]) -> Any:
    @functools.wraps(plain.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = plain
        self.__init__(*args, **kwargs)

    return __init__


def _forward_by_row(cls: type[nn.Module]) -> Any:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        if cls not in type(self).__mro__:  # it was unloaded, and a patched `forward` calls this method from before
            return type(self).forward(self, *args, **kwargs)
        if adapter_names is None:
            return super(cls, self).forward(*args, **kwargs)
        return self(*args, adapter_names=adapter_names, **kwargs)

    return forward


def _rows(table: nn.Module) -> int:
    weight = innermost(table).weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _check_replaceable(model: nn.Module, table: nn.Module | None, replacement: nn.Module) -> None:
    taken = [] if replacement is table else _adapted_with(model, table)
    if taken:
        raise StateError(
            f"{shown(taken)} is adapted or trained in full, which would be lost with the replaced layer. Replace it in the "
            "base first, then adapt that or load the adapter."
        )


def _adapted_with(model: nn.Module, table: nn.Module | None) -> list[str]:
    """Names of the adapted and copied modules that are this table, are tied to it, or contain it."""
    tensors = set() if table is None else {id(p) for p in innermost(table).parameters()}
    return [name for name, wrapper in wrappers(model) if any(id(p) in tensors for p in wrapper.base_layer.parameters())]
