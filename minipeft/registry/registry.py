"""The registry: which class adapts which layer, by method, layer type and name pattern.

Four functions fill it, for the built-in classes and for plugins alike:

* ``register_layer(nn.Linear)`` or ``register_layer("bitsandbytes.nn.Linear8bitLt")``: the `LayerOps` of a layer type; with
  ``weight="torchao.quantization.Int8Tensor"``, of the layers of that type that hold such a weight;
* ``register_method("lora")``: the `Adapter` of a method;
* ``register_targets("gpt2", ["c_attn"])``: default target patterns for a transformers ``model_type``; with ``method=``, for
  one method;
* ``register_adapter("lora", layer=nn.Linear)`` or ``register_adapter("lora", pattern="lm_head")``: an override.

Types are looked up along the MRO, the most derived first, so the order of registration never matters. A dotted name keeps
a heavy package out of ``import minipeft``. Plugins are entry points in the group ``minipeft.plugins``. A look-up loads the
built-in classes first.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from minipeft.errors import RegistryError, hint, shown, told, warn
from minipeft.registry.contract import breach
from minipeft.registry.type_names import qualified, settled

Class = TypeVar("Class", bound=type[Any])


@dataclass
class _Tables:
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # layer type -> weight type or "" -> ops
    methods: dict[str, type[Any]] = field(default_factory=dict)
    targets: dict[tuple[str | None, str, str], tuple[str, ...] | str] = field(default_factory=dict)
    by_layer: dict[str, dict[str, type[Any]]] = field(default_factory=dict)  # layer type -> method -> adapter
    by_pattern: dict[tuple[str, str], type[Any]] = field(default_factory=dict)
    # Of each layer type, what was found since dotted names were settled; asked for every layer of a model.
    candidates: dict[type, tuple[tuple[type, Any], ...]] = field(default_factory=dict)
    classes: dict[tuple[str, type], type[Any]] = field(default_factory=dict)
    settled_with: int = 0  # how many modules of Python were loaded when the dotted names were settled; 0: a name is new


_tables = _Tables()
_BUILT_IN = ["minipeft.layers", "minipeft.methods", "minipeft.injection.default_targets"]  # until they are loaded
_plugins_loaded = False


@contextmanager
def isolated(*, empty: bool = False) -> Iterator[None]:
    """Undo every registration made in the ``with`` block when it ends; with `empty` it starts with none. For tests.

    Installed plugins are loaded first, so that they outlive the block. Inside it, `load_plugins` looks for them again.
    """
    global _plugins_loaded, _tables
    load_plugins()
    before = _plugins_loaded, _tables
    _plugins_loaded, _tables = False, _Tables() if empty else copy.deepcopy(_tables)
    try:
        yield
    finally:
        _plugins_loaded, _tables = before


def register_layer(layer: type | str, *, weight: str | None = None) -> Callable[[Class], Class]:
    """Register the decorated `LayerOps` for a layer type, given as a class or by its dotted name.

    Args:
        layer: the layer type.
        weight: dotted name of a tensor class. These ops are then for layers with such a weight, in addition to the ops of
            the layer type itself; `LayerOps.accepts` tells them apart.

    Raises:
        RegistryError: the class breaks the `LayerOps` contract, or the type already has other ops.
    """
    key, weight_key = _type_key(layer), "" if weight is None else _type_key(weight)
    what = f"layer type {key!r}" + (f" with {weight_key!r} weights" if weight_key else "")
    return _registering(_tables.layers.setdefault(key, {}), weight_key, "LayerOps", what)


def register_method(name: str) -> Callable[[Class], Class]:
    """Register the decorated `Adapter` as the method `name`, in lower case; ``peft_type`` in files is its upper case.

    A class without a `config_class` has no options of its own, and gets one.

    Raises:
        RegistryError: the name is not an identifier or is taken, or the class breaks the `Adapter` contract.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise RegistryError(f"register_method: {name!r} is not a lower-case identifier such as 'lora'.")
    register = _registering(_tables.methods, name, "Adapter", f"method {name!r}")

    def register_with_config(cls: Class) -> Class:
        register(cls).give_config_class(name)
        return cls

    return register_with_config


def register_adapter(
    method: str, *, layer: type | str | None = None, pattern: str | None = None
) -> Callable[[Class], Class]:
    """Override the class that a method uses, for one layer type or for modules whose name matches `pattern`.

    The pattern is a regular expression for the whole name or a dotted suffix of it. It takes precedence over a layer type,
    which takes precedence over the method's own class.

    Raises:
        RegistryError: neither or both of `layer` and `pattern` are given, the class breaks the `Adapter` contract, or
            there is such an override already.
    """
    if (layer is None) == (pattern is None):
        raise RegistryError("register_adapter: give exactly one of layer=... and pattern=...")
    if layer is None:
        what = f"method {method!r} at pattern {pattern!r}"
        return _registering(_tables.by_pattern, (method, pattern), "Adapter", what)
    key = _type_key(layer)
    what = f"method {method!r} on layer type {key!r}"
    return _registering(_tables.by_layer.setdefault(key, {}), method, "Adapter", what)


def register_targets(
    model_type: str, patterns: Sequence[str] | str, *, method: str | None = None, option: str = "target_modules"
) -> None:
    """Set the default of an option for a transformers ``model_type``: suffixes, or one regex for the whole name.

    With `method` it is for that method alone, instead of the general default.

    Raises:
        RegistryError: the patterns are neither a string nor a list of strings, or there is another default already.
    """
    if not isinstance(patterns, str | list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise RegistryError(
            f"the targets of {told(model_type)} must be a list of suffixes or a regex, not {told(patterns)}."
        )
    value = patterns if isinstance(patterns, str) else tuple(patterns)
    known = _tables.targets.setdefault((method, option, model_type), value)
    if known != value:
        raise RegistryError(f"model type {model_type!r} already has the default targets {known!r}, not {value!r}.")


def _registering(table: dict[Any, Any], key: Any, contract: str, what: str) -> Callable[[Class], Class]:
    def register(cls: Class) -> Class:
        broken, known = breach(cls, contract), table.get(key)
        if broken is not None:
            raise RegistryError(broken)
        owner = known if known is None or isinstance(known, type) else type(known)
        if owner is not None and qualified(owner) != qualified(cls):
            raise RegistryError(
                f"{what} is already registered to {qualified(owner)}; {qualified(cls)} was not registered."
            )
        table[key] = cls() if contract == "LayerOps" else cls
        _tables.settled_with = 0
        return cls

    return register


def _type_key(layer: type | str) -> str:
    if isinstance(layer, type):
        return qualified(layer)
    if isinstance(layer, str) and re.fullmatch(r"\w+(\.\w+)+", layer):
        return layer
    raise RegistryError(f"{layer!r} is neither a layer class nor a dotted name such as 'torch.nn.Linear'.")


def layer_candidates(layer_type: type) -> Iterator[tuple[type, Any]]:
    """(registered type, its ops) for a layer type and its bases, the most derived first."""
    _settle_dotted_names()
    if layer_type not in _tables.candidates:
        by_class = ((cls, _tables.layers.get(qualified(cls), {})) for cls in layer_type.__mro__)
        _tables.candidates[layer_type] = tuple((cls, ops) for cls, table in by_class for ops in table.values())
    return iter(_tables.candidates[layer_type])


def layers() -> dict[str, Any]:
    """Every registered layer type and its ops: ``module.qualname``, or ``module.qualname[Weight]`` for a weight type."""
    _settle_dotted_names()
    named = {
        f"{layer}[{weight.rpartition('.')[2]}]" if weight else layer: ops
        for layer, by_weight in _tables.layers.items()
        for weight, ops in by_weight.items()
    }
    return dict(sorted(named.items()))


def layer_type_names() -> list[str]:
    """Short names of the registered layer types, sorted."""
    return sorted({name.rpartition(".")[2] for name in layers()})


def layer_key(layer: type | str) -> str:
    """The name that `layers` has for a layer type, given as a class or by any of its dotted names."""
    return settled(_type_key(layer)) if isinstance(layer, type) or "[" not in layer else layer


def method_class(method: str) -> type[Any]:
    """The `Adapter` class of a method.

    Raises:
        RegistryError: there is no such method; the message lists the known ones.
    """
    _load_built_in()
    cls = _tables.methods.get(method)
    if cls is None:
        known = sorted(_tables.methods)
        raise RegistryError(f"no method {method!r}{hint(method, known)}; registered: {shown(known, 20)}.")
    return cls


def method_names() -> list[str]:
    """Names of the registered methods, sorted."""
    _load_built_in()
    return sorted(_tables.methods)


def adapter_class(method: str, module_name: str, layer_type: type) -> type[Any]:
    """The class that adapts one module: override by name pattern, then by layer type, then the method's own class."""
    generic = method_class(method)
    for (owner, pattern), cls in _tables.by_pattern.items():
        if owner == method and re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module_name):
            return cls
    _settle_dotted_names()
    if (method, layer_type) not in _tables.classes:
        overrides = (_tables.by_layer.get(qualified(base), {}).get(method) for base in layer_type.__mro__)
        _tables.classes[method, layer_type] = next((cls for cls in overrides if cls is not None), generic)
    return _tables.classes[method, layer_type]


def default_targets(method: str | None = None, option: str = "target_modules") -> dict[str, tuple[str, ...] | str]:
    """The default patterns by ``model_type``, of one method (None: the general ones) and option."""
    _load_built_in()
    return {key[2]: patterns for key, patterns in _tables.targets.items() if key[:2] == (method, option)}


def targets_of(
    model_type: str | None, method: str | None = None, option: str = "target_modules"
) -> tuple[str, ...] | str | None:
    """One of the `default_targets`, or None: that of a ``model_type``."""
    _load_built_in()
    return _tables.targets.get((method, option, model_type or ""))


def _load_built_in() -> None:
    """Import what registers the built-in classes, at the first look-up."""
    while _BUILT_IN:
        importlib.import_module(_BUILT_IN.pop(0))


def _settle_dotted_names() -> None:
    """Replace an alias (``torch.nn.Linear``) by the class's own name once its package is loaded."""
    _load_built_in()
    if _tables.settled_with == len(sys.modules):  # asked for every layer of a model
        return
    _tables.settled_with = len(sys.modules)
    _tables.candidates.clear()
    _tables.classes.clear()
    tables: tuple[dict[str, dict[str, Any]], ...] = (_tables.layers, _tables.by_layer)
    for table in tables:
        for key in list(table):
            real = settled(key)
            if real != key:
                table[real] = {**table.pop(key), **table.get(real, {})}


def load_plugins() -> None:
    """Import every entry point of the group ``minipeft.plugins``, once; ``MINIPEFT_DISABLE_PLUGINS=1`` skips them.

    A plugin that fails is named in a warning and its registrations are undone; the others load.
    """
    global _plugins_loaded, _tables
    _load_built_in()
    if _plugins_loaded or os.environ.get("MINIPEFT_DISABLE_PLUGINS") == "1":
        return
    _plugins_loaded = True
    for entry in sorted(importlib.metadata.entry_points(group="minipeft.plugins"), key=lambda e: e.name):
        before = copy.deepcopy(_tables)
        try:
            entry.load()
        except (Exception, SystemExit) as error:  # whatever a plugin raises must not take the host down
            _tables = before
            said = f"minipeft plugin {entry.name!r} ({entry.value}) failed to load and is left out: {error!r}"
            warn(said)
