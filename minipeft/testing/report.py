"""Running the contract's checks on pairs of a method and a layer type, and what came of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from minipeft.errors import ConfigError, ContractError, RegistryError, TargetError, hint, shown
from minipeft.kernels.generators import generators_kept
from minipeft.model import get_adapter_model
from minipeft.registry import registry
from minipeft.testing.case import Case, case_of, fingerprint, layers_of
from minipeft.testing.checks import CHECKS
from minipeft.testing.examples import Make


@dataclass(frozen=True)
class PairReport:
    """The result of one method on one layer type.

    Args:
        method: name of the method.
        layer: name of the layer type, ``module.qualname``.
        passed: the checks that passed.
        skipped: the checks that were skipped, and why this pair may skip them.
        refused: the message with which the method refuses the layer, or None.
    """

    method: str
    layer: str
    passed: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    refused: str | None = None

    @property
    def served(self) -> bool:
        """Whether the method was tried on the layer and adapts it."""
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
    """The results of several pairs; as a string, one line for each pair and for each reason to skip checks."""

    pairs: tuple[PairReport, ...]

    @property
    def skipped(self) -> dict[tuple[str, str, str], str]:
        """(method, layer, check) -> why it was skipped."""
        return {(p.method, p.layer, check): why for p in self.pairs for check, why in p.skipped.items()}

    @property
    def refused(self) -> dict[tuple[str, str], str]:
        """(method, layer) -> the message of the refusal."""
        return {(p.method, p.layer): p.refused for p in self.pairs if p.refused is not None}

    def __str__(self) -> str:
        return "\n".join(str(pair) for pair in self.pairs)


def check_method(name: str, **options: Any) -> Report:
    """Run all checks for a method on every registered layer type.

    Args:
        name: of a registered method.
        options: options of its configuration, on top of those of `register_options`.

    Raises:
        ContractError: a check fails, or the method serves no layer type at all.
        RegistryError: there is no such method.
    """
    registry.load_plugins()
    registry.method_class(name)
    pairs = tuple(_pair(name, layer, ops, None, options) for layer, ops in registry.layers().items())
    if not any(pair.served for pair in pairs):
        raise ContractError(name, "", "serves", f"no registered layer type is served:\n{Report(pairs)}")
    return Report(pairs)


def check_layer(layer: type | str, make: Make | None = None) -> Report:
    """Run all checks for a layer type under every registered method.

    Args:
        layer: the type, or its dotted name.
        make: (in_features, out_features) -> a small layer. None: as registered by `register_example`.

    Raises:
        ContractError: a check fails, or no method serves the layer.
        RegistryError: no ops are registered for the type.
        TargetError: there is no example to try, or its ops do not accept it.
    """
    registry.load_plugins()
    name, ops = _found(layer, make)
    case_of(registry.method_names()[0], name, ops, make, {})  # an error of the example alone
    pairs = tuple(_pair(method, name, ops, make, {}) for method in registry.method_names())
    if not any(pair.served for pair in pairs):
        raise ContractError("", name, "serves", f"no registered method serves it:\n{Report(pairs)}")
    return Report(pairs)


def check_pair(method: str, layer: type | str, make: Make | None = None, **options: Any) -> PairReport:
    """Run all checks for one method on one layer type; arguments and errors are those of the other two."""
    registry.load_plugins()
    return _pair(method, *_found(layer, make), make, options)


def refusal(method: str, layer: type | str, make: Make | None = None) -> str | None:
    """The message with which a method refuses a layer type, or None if it adapts it; no other check runs.

    Raises:
        ContractError: the injection fails in another way, or changes the model although it refuses it.
        RegistryError: no ops are registered for the type, or there is no such method.
        TargetError: there is no example to try.
    """
    with generators_kept():
        return _refusal(case_of(method, *_found(layer, make), make, {}))


def _found(layer: type | str, make: Make | None) -> tuple[str, Any]:
    """The layer type's name and its ops, or None if those can only be found for an instance that `make` makes."""
    name, known = registry.layer_key(layer), registry.layers()
    if name in known:
        return name, known[name]
    if make is None:
        raise RegistryError(
            f"no LayerOps are registered for {name!r} itself{hint(name, known)}; known: {shown(known, 20)}. If those "
            "of a base class serve it, pass make=..."
        )
    return name, None


@generators_kept()
def _pair(method: str, layer: str, ops: Any, make: Make | None, options: Mapping[str, Any]) -> PairReport:
    try:
        case = case_of(method, layer, ops, make, options)
    except TargetError as error:  # without an example no check can run
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
    """The message with which the pair is refused, or None; fails if another class than the method's own acts."""
    model = case.base()
    before = fingerprint(model)
    try:
        adapted = get_adapter_model(model, case.config())
    except (TargetError, ConfigError) as error:
        if fingerprint(model) != before:
            raise case.fail("refusal", f"it is refused ({error}), but changes the model") from None
        _check_options(case)
        return str(error)
    except Exception as error:
        raise case.fail("injection", f"{type(error).__name__}: {error}") from error
    acting = {type(layer.adapters["default"]) for layer in layers_of(adapted) if isinstance(layer.ops, type(case.ops))}
    wanted = registry.adapter_class(case.method, "layer", type(case.base().layer))
    if wanted not in acting:
        names = shown(sorted(cls.__name__ for cls in acting))
        raise case.fail("injection", f"{wanted.__name__} should act, but {names} does; see its config_class")
    return None


def _check_options(case: Case) -> None:
    """Fail if the configuration is refused on any layer, since an option is wrong or missing."""
    try:
        case.adapter.config_class(target_modules=["layer"], **case.options)
    except ConfigError as error:
        raise case.fail("options", f"{error} Pass the option, or call testing.register_options.") from error
