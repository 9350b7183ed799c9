"""Which layers do not get the rows of the batch first, but positions, images, or tokens of an expert.

XLNet and torch's own transformer layers put positions first, and a table of positions is read without rows. The shape of an
input shows that, unless a batch has as many positions as rows. Then one row is run alone, once for each model: the dimension
of size 1 is that of the rows. The same for images, whose size does not say how many positions they have. Modules with
torch's ``batch_first`` say which of their dimensions is the rows. If one row alone has another dimension of size 1 there, the
first dimension of the model's input is not the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from minipeft.ecosystem.transformers_model import (
    CACHES,
    base_prefix,
    input_embedding,
    main_input_name,
    media_input,
    takes_media,
    takes_text,
    text_part,
)
from minipeft.errors import StateError
from minipeft.injection.module_tree import outside_adapters, wrappers
from minipeft.injection.rows import MEDIA_OF_BATCH, POSITIONS_FIRST, Rows, acting
from minipeft.injection.rows_of_call import main_input
from minipeft.injection.targets import within
from minipeft.injection.wrapper import Wrapper, innermost
from minipeft.kernels.generators import generators_kept

BY_POSITION = {"cache_position"}  # arguments of transformers' models without a dimension of rows
EXPERTS = {"expert", "experts"}  # what models call the list of them


def learn_order(
    model: nn.Module, rows: Rows, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Mark the layers that are called with positions before rows, or without rows. `call` is the model's own.

    Returns:
        Whether that is known now for other batches too.

    Raises:
        StateError: one row alone cannot be run, or the first dimension of the model's input is not the rows.
    """
    given, seen = main_input(model, args, kwargs), list[Wrapper]()
    count = len(rows.names) if given is None else len(given)  # beams are rows of their own
    sizes: dict[str, tuple[int, int]] = {}  # numbers of rows and positions that modules with `batch_first` take

    def note(wrapper: Any, given: tuple[Any, ...]) -> None:
        x = given[0] if given else None
        if isinstance(x, Tensor) and x.ndim and x.shape[0] != 1 and wrapper.called_with is None:
            seen.append(wrapper)

    first_args, first_kwargs = _first_row(count, args, kwargs)
    hooks = [wrapper.register_forward_pre_hook(note) for _, wrapper in wrappers(model)]
    for path, module in outside_adapters(model):
        if says_order(module):
            hooks.append(module.register_forward_pre_hook(functools.partial(_note_sizes, sizes, path)))
    try:
        with torch.no_grad(), generators_kept(), acting(None):
            call(*first_args, **first_kwargs)
    except Exception as error:
        if rows.length is None:  # as many positions as rows would be chance
            return True
        raise StateError(
            f"adapter_names: {type(model).__name__} does not run on one of its {count} rows alone, so it cannot be told whether "
            "rows or positions come first in its layers. Give it other than as many positions as rows, if that is so."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for path, (others, positions) in sizes.items():
        if others > positions == 1:
            raise StateError(
                f"adapter_names: the first dimension of the input of {type(model).__name__} reaches {path} as positions (see its "
                "batch_first), so it is not the rows. Give all of them the same name, or the model inputs with rows first."
            )
    for wrapper in seen:
        wrapper.called_with = POSITIONS_FIRST
    return rows.length != 1 or not sizes


def _first_row(count: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call for the first of its `count` rows, without a cache."""

    def first(tensor: Tensor) -> Tensor:
        return tensor[:1] if tensor.ndim and tensor.shape[0] == count else tensor

    named = {
        name: value if name in BY_POSITION else tree_map_only(Tensor, first, value) for name, value in kwargs.items()
    }
    for name in CACHES:
        if named.pop(name, None) is not None:
            named["use_cache"] = False
    return tree_map_only(Tensor, first, tuple(args)), named


def _note_sizes(sizes: dict[str, tuple[int, int]], path: str, module: Any, given: tuple[Any, ...]) -> None:
    if given and isinstance(given[0], Tensor) and given[0].ndim == 3:
        first, second = given[0].shape[:2]
        sizes[path] = (first, second) if module.batch_first else (second, first)


def mark_rows(model: nn.Module, outside: Iterable[tuple[str, nn.Module]]) -> bool:
    """Note at each wrapper among a model's `outside_adapters` what it is called with in place of the rows, if anything.

    Returns whether one row alone may show more than the shapes of inputs: a module says if rows or positions come first, or a
    table is adapted that may be read by positions, such as a decoder's own.
    """
    found = _by_input(model, outside)
    tokens, language = input_embedding(model), text_part(model)
    is_multimodal = found.is_of_text and takes_media(model) and language is not None and language is not model
    base = base_prefix(model)
    heads_apart = bool(base and found.media) and all(within(path, {base}) for path in found.media)
    unclear = found.says_order
    for path, wrapper in found.adapted:
        parts = path.split(".")
        around = {".".join(parts[:depth]) for depth in range(1, len(parts))} if found.media or is_multimodal else set()
        # What is neither in the language model nor a head brings images to it, and those are in no relation to the rows.
        is_head = parts[0] != base if heads_apart else not around
        brings_media = is_multimodal and not is_head and around.isdisjoint(found.text)
        called_with = MEDIA_OF_BATCH if brings_media or not around.isdisjoint(found.media) else None
        if not EXPERTS.isdisjoint(parts):
            called_with = "the tokens that chose one expert"
        if wrapper.called_with != called_with:
            wrapper.called_with = called_with
        unclear |= called_with is None and isinstance(innermost(wrapper), nn.Embedding) and wrapper is not tokens
    return unclear


class _ByInput(NamedTuple):
    """The modules of a model, sorted by what they are called with."""

    adapted: list[tuple[str, Wrapper]]
    media: set[str]  # names of modules that are called with images or sound
    text: set[str]  # names of modules that are called with text alone
    says_order: bool  # whether one of them says if rows or positions come first
    is_of_text: bool  # whether the model itself mainly reads tokens


def _by_input(model: nn.Module, outside: Iterable[tuple[str, nn.Module]]) -> _ByInput:
    adapted, media, text, ordered = list[tuple[str, Wrapper]](), set[str](), set[str](), False
    is_of_text, language = main_input_name(model) == "input_ids", text_part(model)
    kinds: dict[type, tuple[bool, bool]] = {}  # whether a module of this type takes media, and text
    for path, module in outside:
        if isinstance(module, Wrapper):
            adapted.append((path, module))
            continue
        ordered |= says_order(module)
        if (kind := type(module)) not in kinds:
            kinds[kind] = is_of_text and media_input(module) is not None, takes_text(module)
        for_media, for_text = kinds[kind]
        if path and for_media:
            media.add(path)
        elif path and (for_text or module is language):
            text.add(path)
    return _ByInput(adapted, media, text, ordered, is_of_text)


def says_order(module: nn.Module) -> bool:
    """Whether it is an attention or a recurrent layer of torch's, or like them."""
    # An attribute that a module lacks takes long to ask for.
    return isinstance(vars(module).get("batch_first", getattr(type(module), "batch_first", None)), bool)
