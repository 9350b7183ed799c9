"""The contract, public: hold a method or a layer of your own to everything that the rest of the library relies on.

    from minipeft.testing import check_layer, check_method

    print(check_method("my_method"))  # on every registered layer type
    print(check_layer(MyLayer, make=lambda i, o: MyLayer(i, o)))  # under every registered method

Both need nothing but minipeft, raise a `ContractError` that names method, layer and promise, and give back a `Report`
that says of each pair what was tried, what was skipped and why, or with which words the pair is refused. `CHECKS` are the
promises, one function each (see `minipeft.testing.checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from minipeft import registry
from minipeft.errors import ConfigError, ContractError, RegistryError, TargetError, hint, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.model import get_adapter_model
from minipeft.testing.case import Case, case_of, fingerprint, layers_of
from minipeft.testing.checks import CHECKS

Make = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class PairReport:
    """What came of one method on one layer type.

    Args:
        method: name of the method.
        layer: name of the layer type, ``module.qualname``.
        passed: the checks that hold.
        skipped: the checks that were not made, and why the contract lets this pair skip them.
        refused: the words of the refusal where the method does not serve the layer, else None.
    """

    method: str
    layer: str
    passed: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    refused: str | None = None

    @property
    def served(self) -> bool:
        """Whether the method adapts the layer, as far as was tried."""
        return self.refused is None and bool(self.passed)

    def __str__(self) -> str:
        name = f"{self.method} on {self.layer.rpartition('.')[2]}"
        if self.refused is not None:
            return f"{name}: refused: {self.refused}"
        reasons: dict[str, list[str]] = {}
        for check, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(check)
        lines = [f"    skipped {', '.join(checks)}: {reason}" for reason, checks in reasons.items()]
        return "\n".join(
            [f"{name}: {len(self.passed)} of {len(self.passed) + len(self.skipped)} checks passed", *lines]
        )


@dataclass(frozen=True)
class Report:
    """What came of several pairs; as a string, one line for each, and one for whatever was skipped."""

    pairs: tuple[PairReport, ...]

    @property
    def skipped(self) -> dict[tuple[str, str, str], str]:
        """(method, layer, check) -> why it was not made."""
        return {(p.method, p.layer, check): why for p in self.pairs for check, why in p.skipped.items()}

    @property
    def refused(self) -> dict[tuple[str, str], str]:
        """(method, layer) -> the words of the refusal."""
        return {(p.method, p.layer): p.refused for p in self.pairs if p.refused is not None}

    def __str__(self) -> str:
        return "\n".join(str(pair) for pair in self.pairs)


def check_method(name: str, **options: Any) -> Report:
    """Run the whole contract for a method on every registered layer type.

    Args:
        name: of a registered method.
        options: further ones of its configuration, on top of `Adapter.example_config`'s.

    Raises:
        ContractError: a check fails, or the method serves no layer type at all.
        RegistryError: no such method.
    """
    registry.load_plugins()
    registry.method_class(name)
    pairs = tuple(_pair(name, layer, ops, None, options) for layer, ops in registry.layers().items())
    if not any(pair.served for pair in pairs):
        raise ContractError(name, "", "serves", f"no registered layer type is served:\n{Report(pairs)}")
    return Report(pairs)


def check_layer(layer: type | str, make: Make | None = None) -> Report:
    """Run the whole contract for a layer type under every registered method.

    Args:
        layer: the type, or its dotted name.
        make: (in_features, out_features) -> a small layer; None: `LayerOps.example` makes it.

    Raises:
        ContractError: a check fails, or no method serves the layer.
        RegistryError: no ops are registered for the type.
        TargetError: there is no example to try, or ops do not accept it.
    """
    registry.load_plugins()
    name, ops = _found(layer, make)
    case_of(registry.method_names()[0], name, ops, make, {})  # whatever there is to say of the example alone
    pairs = tuple(_pair(method, name, ops, make, {}) for method in registry.method_names())
    if not any(pair.served for pair in pairs):
        raise ContractError("", name, "serves", f"no registered method serves it:\n{Report(pairs)}")
    return Report(pairs)


def check_pair(method: str, layer: type | str, make: Make | None = None, **options: Any) -> PairReport:
    """Run the whole contract for one method on one layer type; arguments and errors are those of the other two."""
    registry.load_plugins()
    return _pair(method, *_found(layer, make), make, options)


def refusal(method: str, layer: type | str, make: Make | None = None) -> str | None:
    """The words with which a method refuses a layer type, or None if it adapts it; no other check is made.

    Raises:
        ContractError: the injection fails in another way, or a refused one changes the model.
        RegistryError: no ops are registered for the type, or no such method.
        TargetError: there is no example to try.
    """
    with torch.random.fork_rng(devices=[]):
        return _refusal(case_of(method, *_found(layer, make), make, {}))


def _found(layer: type | str, make: Make | None) -> tuple[str, Any]:
    """The layer type's name, and what is registered for it; None where only an instance can tell, which `make` makes."""
    name, known = registry.layer_key(layer), registry.layers()
    if name in known:
        return name, known[name]
    if make is None:
        raise RegistryError(
            f"no LayerOps are registered for {name!r} itself{hint(name, known)}; known: {shown(known, 20)}. Where those of "
            "a base class serve it, pass make=..."
        )
    return name, None


@torch.random.fork_rng(devices=[])
def _pair(method: str, layer: str, ops: Any, make: Make | None, options: Mapping[str, Any]) -> PairReport:
    try:
        case = case_of(method, layer, ops, make, options)
    except TargetError as error:  # no example: reported for each check, since none was made
        return PairReport(method, layer, skipped={check.__name__: str(error) for check in CHECKS})
    refused = _refusal(case)
    if refused is not None:
        return PairReport(method, layer, refused=refused)
    passed, skipped = [], {}
    for name, reason in _results(case):
        if reason is None:
            passed.append(name)
        else:
            skipped[name] = reason
    return PairReport(method, layer, tuple(passed), skipped)


def _results(case: Case) -> Iterator[tuple[str, str | None]]:
    for check in CHECKS:
        try:
            yield check.__name__, check(case)
        except ContractError:
            raise
        except Exception as error:
            raise case.fail(check.__name__, f"{type(error).__name__}: {error}") from error


def _refusal(case: Case) -> str | None:
    """The words with which the pair is refused, or None; whichever it is, the method that is tried is the one that acts."""
    model = case.base()
    before = fingerprint(model)
    try:
        adapted = get_adapter_model(model, case.config())
    except (TargetError, ConfigError) as error:
        if fingerprint(model) != before:
            raise case.fail("refusal", f"it is refused ({error}), but changes the model") from None
        _check_example_config(case)
        return str(error)
    except Exception as error:
        raise case.fail("injection", f"{type(error).__name__}: {error}") from error
    acting = {type(layer.adapters["default"]) for layer in layers_of(adapted) if _serves(case, layer)}
    wanted = registry.adapter_class(case.method, "layer", type(case.base().layer))
    if wanted not in acting:
        names = shown(sorted(cls.__name__ for cls in acting))
        raise case.fail("injection", f"{wanted.__name__} should act, but {names} does; see Adapter.example_config")
    return None


def _check_example_config(case: Case) -> None:
    """That the refusal is not one of every layer, since the method's example of a configuration is none."""
    try:
        case.adapter.example_config(target_modules=["layer"], **case.options)
    except ConfigError as error:
        raise case.fail("example_config", f"{error} Override Adapter.example_config, or give the option.") from error


def _serves(case: Case, layer: AdaptedLayer) -> bool:
    return isinstance(layer.ops, type(case.ops))


__all__ = ["CHECKS", "PairReport", "Report", "check_layer", "check_method", "check_pair", "refusal"]
