"""The registry: which class adapts which layer, by method, layer type and name pattern.

Four decorators fill it, for the built-in classes and for a stranger's plugin alike:

* ``register_layer(nn.Linear)`` or ``register_layer("bitsandbytes.nn.Linear8bitLt")``: a `LayerOps` for a layer type,
  or with ``weight="torchao.quantization.Int8Tensor"`` for those layers of it that hold such a weight;
* ``register_method("lora")``: an `Adapter` for a method;
* ``register_targets("gpt2", ["c_attn"])``: default target patterns for a transformers ``model_type``;
* ``register_adapter("lora", layer=nn.Linear, pattern="lm_head")``: an override for some layers or some names.

Types resolve along the MRO, the most derived first, so the order of registration never matters. A dotted name keeps
a heavy package out of ``import minipeft``. Plugins stand in the entry-point group ``minipeft.plugins``.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from minipeft.errors import RegistryError, hint, shown

Class = TypeVar("Class", bound=type[Any])
PLUGIN_GROUP = "minipeft.plugins"


def qualified(cls: type) -> str:
    """``module.qualname``: the identity of a class, the same after a notebook reload."""
    return f"{cls.__module__}.{cls.__qualname__}"


@dataclass
class _Tables:
    layers: dict[str, Any] = field(default_factory=dict)
    layers_by_weight: dict[tuple[str, str], Any] = field(default_factory=dict)
    methods: dict[str, type[Any]] = field(default_factory=dict)
    targets: dict[str, tuple[str, ...] | str] = field(default_factory=dict)
    by_layer: dict[tuple[str, str], type[Any]] = field(default_factory=dict)
    by_pattern: dict[tuple[str, str], type[Any]] = field(default_factory=dict)

    def copy(self) -> _Tables:
        return _Tables(**{name: dict(table) for name, table in vars(self).items()})


_tables = _Tables()
_plugins_loaded = False


@contextmanager
def isolated(*, empty: bool = False) -> Iterator[None]:
    """Undo every registration made in the ``with`` block when it ends; for tests.

    Installed plugins are loaded before it begins, so that they outlive it. Inside, `load_plugins` looks again.

    Args:
        empty: start with nothing registered instead of a copy of what is.
    """
    global _plugins_loaded, _tables
    load_plugins()
    before = _plugins_loaded, _tables
    _plugins_loaded, _tables = False, _Tables() if empty else _tables.copy()
    try:
        yield
    finally:
        _plugins_loaded, _tables = before


def register_layer(layer: type | str, *, weight: str | None = None) -> Callable[[Class], Class]:
    """Register the decorated `LayerOps` for a layer type, given as a class or as its dotted name.

    Args:
        layer: the layer type.
        weight: dotted name of a tensor class: these ops are for layers with such a weight, beside those of the layer
            type itself. Which ones take a layer is for their `accepts` to say.

    Raises:
        RegistryError: the class breaks the `LayerOps` contract, or the type has other ops already.
    """
    if weight is not None:
        key = (_type_key(layer), _type_key(weight))
        return _registering(_tables.layers_by_weight, key, "LayerOps", f"layer type {key[0]!r} with {key[1]!r} weights")
    return _registering(_tables.layers, _type_key(layer), "LayerOps", f"layer type {_type_key(layer)!r}")


def register_method(name: str) -> Callable[[Class], Class]:
    """Register the decorated `Adapter` as the method `name`, lower case; ``peft_type`` in files is its upper case.

    Raises:
        RegistryError: the name is not an identifier, the contract is broken, or the name is taken.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise RegistryError(f"register_method: {name!r} is not a lower-case identifier such as 'lora'.")
    return _registering(_tables.methods, name, "Adapter", f"method {name!r}")


def register_adapter(
    method: str, *, layer: type | str | None = None, pattern: str | None = None
) -> Callable[[Class], Class]:
    """Override the class a method uses: for one layer type, or for the modules whose name fits `pattern`.

    The pattern is a regular expression for the whole name or a dotted suffix of it. A pattern goes before a layer
    type, and a layer type before the method's own class.

    Raises:
        RegistryError: neither or both of `layer` and `pattern` are given, the contract is broken, or the place is taken.
    """
    if (layer is None) == (pattern is None):
        raise RegistryError("register_adapter: give exactly one of layer=... and pattern=...")
    if pattern is not None:
        return _registering(
            _tables.by_pattern, (method, pattern), "Adapter", f"method {method!r} at pattern {pattern!r}"
        )
    key = _type_key(layer)  # type: ignore[arg-type]
    return _registering(_tables.by_layer, (method, key), "Adapter", f"method {method!r} on layer type {key!r}")


def register_targets(model_type: str, patterns: Sequence[str] | str) -> None:
    """Set the default `target_modules` of a transformers ``model_type``: suffixes, or one full-match regex.

    Raises:
        RegistryError: the model type has other patterns already.
    """
    value = patterns if isinstance(patterns, str) else tuple(patterns)
    known = _tables.targets.setdefault(model_type, value)
    if known != value:
        raise RegistryError(
            f"model type {model_type!r} already has the default targets {known!r}; not changed to {value!r}."
        )


def _registering(table: dict[Any, Any], key: Any, contract: str, what: str) -> Callable[[Class], Class]:
    def register(cls: Class) -> Class:
        _check_contract(cls, contract)
        known = table.get(key)
        owner = known if known is None or isinstance(known, type) else type(known)
        if owner is not None and qualified(owner) != qualified(cls):
            raise RegistryError(
                f"{what} is already registered to {qualified(owner)}; {qualified(cls)} was not registered."
            )
        table[key] = cls() if contract == "LayerOps" else cls
        return cls

    return register


def _type_key(layer: type | str) -> str:
    if isinstance(layer, type):
        return qualified(layer)
    if isinstance(layer, str) and re.fullmatch(r"\w+(\.\w+)+", layer):
        return layer
    raise RegistryError(f"{layer!r} is neither a layer class nor a dotted name such as 'torch.nn.Linear'.")


def _check_contract(cls: type, contract: str) -> None:
    """Hold a class to its contract when it registers: derived, complete, and with the contract's parameter names."""
    name = getattr(cls, "__name__", repr(cls))
    root = next((base for base in getattr(cls, "__mro__", ()) if vars(base).get("contract") == contract), None)
    if root is None:
        raise RegistryError(f"{name} does not derive from minipeft.{contract}, so it cannot be registered as one.")
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise RegistryError(f"{name} lacks {shown(missing)} of the {contract} contract.")
    for method in _public_functions(root):
        wanted, given = (list(inspect.signature(getattr(owner, method)).parameters) for owner in (root, cls))
        if given[: len(wanted)] != wanted:
            raise RegistryError(
                f"{name}.{method}({', '.join(given)}) does not fit the {contract} contract: {method}({', '.join(wanted)})."
            )


def _public_functions(root: type) -> Iterator[str]:
    for name, value in vars(root).items():
        if isinstance(value, staticmethod | classmethod) or inspect.isfunction(value):
            if not name.startswith("_") or name == "__init__":
                yield name


# --------------------------------------------------------------------------------------------------- resolution
def layer_candidates(layer_type: type) -> Iterator[tuple[type, Any]]:
    """(registered type, its ops) for a layer type and its bases, the most derived first."""
    _settle_dotted_names()
    for cls in layer_type.__mro__:
        name = qualified(cls)
        ops = _tables.layers.get(name)
        if ops is not None:
            yield cls, ops
        for (layer, _), ops in _tables.layers_by_weight.items():
            if layer == name:
                yield cls, ops


def layer_classes() -> list[Any]:
    """Every registered `LayerOps`."""
    return [*_tables.layers.values(), *_tables.layers_by_weight.values()]


def layer_type_names() -> list[str]:
    """Short names of the registered layer types, sorted."""
    packed = {f"{layer.rsplit('.', 1)[-1]}[{weight.rsplit('.', 1)[-1]}]" for layer, weight in _tables.layers_by_weight}
    return sorted({key.rsplit(".", 1)[-1] for key in _tables.layers} | packed)


def layers() -> dict[str, Any]:
    """Every registered layer type, as ``module.qualname`` or, for a packed weight, ``module.qualname[Weight]``; and its ops."""
    _settle_dotted_names()
    packed = {f"{layer}[{key.rpartition('.')[2]}]": ops for (layer, key), ops in _tables.layers_by_weight.items()}
    return dict(sorted({**_tables.layers, **packed}.items()))


def layer_key(layer: type | str) -> str:
    """The name under which `layers` has a layer type, given as a class or as any dotted name of it."""
    _settle_dotted_names()
    return _settled(_type_key(layer)) if isinstance(layer, type) or "[" not in layer else layer


def method_class(method: str) -> type[Any]:
    """The `Adapter` class of a method.

    Raises:
        RegistryError: no such method; the message lists those there are.
    """
    cls = _tables.methods.get(method)
    if cls is None:
        known = sorted(_tables.methods)
        raise RegistryError(f"no method {method!r}{hint(method, known)}; registered: {shown(known, 20)}.")
    return cls


def method_names() -> list[str]:
    """Names of the registered methods, sorted."""
    return sorted(_tables.methods)


def adapter_class(method: str, module_name: str, layer_type: type) -> type[Any]:
    """The class that adapts one module: override by name pattern, then by layer type, then the method's own class."""
    generic = method_class(method)
    for (owner, pattern), cls in _tables.by_pattern.items():
        if owner == method and re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module_name):
            return cls
    _settle_dotted_names()
    for base in layer_type.__mro__:
        override = _tables.by_layer.get((method, qualified(base)))
        if override is not None:
            return override
    return generic


def default_targets(model_type: str) -> tuple[str, ...] | str | None:
    """Default patterns of a transformers ``model_type``, or None where nothing is registered."""
    return _tables.targets.get(model_type)


def known_model_types() -> list[str]:
    """The model types with default patterns, sorted."""
    return sorted(_tables.targets)


def _settle_dotted_names() -> None:
    """Replace a dotted name that is an alias (``torch.nn.Linear``) by the class's own, once its package is loaded."""
    for key in list(_tables.layers):
        real = _settled(key)
        if real != key:
            _tables.layers.setdefault(real, _tables.layers.pop(key))
    for key, weight in list(_tables.layers_by_weight):
        real = _settled(key)
        if real != key:
            _tables.layers_by_weight.setdefault((real, weight), _tables.layers_by_weight.pop((key, weight)))
    for method, key in list(_tables.by_layer):
        real = _settled(key)
        if real != key:
            _tables.by_layer.setdefault((method, real), _tables.by_layer.pop((method, key)))


def _settled(key: str) -> str:
    module, _, name = key.rpartition(".")
    target = getattr(sys.modules.get(module), name, None)
    return qualified(target) if isinstance(target, type) else key


# ------------------------------------------------------------------------------------------------------ plugins
def load_plugins() -> None:
    """Import every entry point of the group ``minipeft.plugins``, once; ``MINIPEFT_DISABLE_PLUGINS=1`` skips them.

    A plugin that fails is named in a warning, what it had registered is taken back, and the others load.
    """
    global _plugins_loaded, _tables
    if _plugins_loaded or os.environ.get("MINIPEFT_DISABLE_PLUGINS") == "1":
        return
    _plugins_loaded = True
    for entry in sorted(importlib.metadata.entry_points(group=PLUGIN_GROUP), key=lambda e: e.name):
        before = _tables.copy()
        try:
            entry.load()
        except (Exception, SystemExit) as error:  # whatever foreign code raises must not take the host down
            _tables = before
            warnings.warn(
                f"minipeft plugin {entry.name!r} ({entry.value}) failed to load and is left out: {error!r}",
                stacklevel=2,
            )
