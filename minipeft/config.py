"""Adapter configuration: a frozen dataclass, checked when built, to and from PEFT's ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Self

from minipeft import registry
from minipeft.errors import ConfigError, hint, shown, told
from minipeft.patterns import compiled

ALL_LINEAR = "all-linear"
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# Heads that PEFT trains in full without being asked, where the model has them.
HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Keys of PEFT's files that describe the file, or parameterise options which have a key of their own.
_METADATA = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "revision",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
}


class _KnownNames(type):
    """Turns an unknown or misspelt option into a `ConfigError` that names the nearest one."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"{cls.__name__} has no option {name!r}{hint(name, known)}; known: {', '.join(known)}."
                )
        return super().__call__(*args, **options)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(metaclass=_KnownNames):
    """What every method is told: which modules it adapts, and what stands beside them. Names and meanings are PEFT's.

    Args:
        target_modules: suffixes at a dot boundary (``["c_attn"]``), one regular expression for the whole name, or
            ``"all-linear"``, which leaves the output head out. None: the default of the model's ``model_type``. It
            may be empty beside bare parameters to adapt.
        exclude_modules: suffixes, or one regular expression; goes before `target_modules`.
        layers_to_transform: layer indices to keep, with `target_modules` a list.
        layers_pattern: name of the module list that the indices count, such as ``"h"``; None: the first number in a name.
        modules_to_save: suffixes of modules that are copied, trained and saved in full.
        task_type: one of `TASK_TYPES`; a classification task also trains its head in full.
        base_model_name_or_path: written to the file; None: the model's own ``name_or_path``.
        inference_mode: add the adapter frozen.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or an option does not exist.
    """

    method: ClassVar[str]
    not_in_files: ClassVar[frozenset[str]] = frozenset()  # options below that PEFT's class of this method lacks

    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            none = name == "target_modules" and self.parameters_to_adapt and getattr(self, name) in ([], ())
            self._set(name, () if none else names_or_regex(name, getattr(self, name)))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self._set("target_modules", ALL_LINEAR)
        self._set("modules_to_save", names("modules_to_save", self.modules_to_save))
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        self._set("layers_pattern", names("layers_pattern", patterns))
        indices = self.layers_to_transform
        if indices is not None:
            self._set("layers_to_transform", _layer_indices("layers_to_transform", indices))
            if isinstance(self.target_modules, str):
                raise ConfigError(
                    "layers_to_transform needs target_modules as a list, since one regex can say the layers itself."
                )
        if self.layers_pattern is not None and indices is None:
            raise ConfigError("layers_pattern needs layers_to_transform, the indices to keep.")
        task = self.task_type.value if isinstance(self.task_type, enum.Enum) else self.task_type
        self._set("task_type", None if task is None else one_of("task_type", task, TASK_TYPES))
        if self.base_model_name_or_path is not None and not isinstance(self.base_model_name_or_path, str):
            raise ConfigError(
                f"base_model_name_or_path must be a string or None, not {told(self.base_model_name_or_path)}."
            )
        flag("inference_mode", self.inference_mode)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the one way into a frozen dataclass while it is being built

    @property
    def adapter_method(self) -> str:
        """The registered method whose class adapts under this configuration: an option may ask for a variant of `method`.

        What ``register_adapter`` overrides is then that of the variant.
        """
        return self.method

    @property
    def trains_all_biases(self) -> bool:
        """Whether the biases of modules that are not adapted train too."""
        return False

    def for_model_type(self, model_type: str | None) -> Self:
        """The configuration with what it leaves to the transformers ``model_type`` filled in; by default itself.

        A target that is still None afterwards is the registered default.
        """
        return self

    @property
    def parameters_to_adapt(self) -> Sequence[str]:
        """Suffixes of the names of bare parameters to adapt; a method that can has an option for it, `target_parameters`."""
        return ()

    def needs_a_call(self) -> list[str]:
        """Options in use that act on what goes into a layer or comes out: no good where a weight is read, not called."""
        return []

    def companions(self) -> Sequence[tuple[str, AdapterConfig]]:
        """Configurations of other methods that adapt beside this one, each with what stands before its keys in a file.

        Their modules are their own: no module is adapted by both.
        """
        return ()

    def default_modules(self, model: nn.Module) -> Sequence[str] | None:
        """The modules to adapt where `target_modules` is None; None: as registered for the model's ``model_type``.

        Raises:
            TargetError: the model has none of the kind.
        """
        return None

    def for_modules(self, names: Sequence[str]) -> dict[str, Self]:
        """The configuration that holds for each of the targeted modules; methods with per-module options override it."""
        return dict.fromkeys(names, self)

    def unused_options(self, names: Sequence[str]) -> list[str]:
        """Per-module options that decide for none of the targeted modules, as ``option: key``."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """PEFT's keys, JSON-ready; ``inference_mode`` is always written as true, as PEFT does."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: _listed(v) for k, v in values.items() if k not in self.not_in_files}
        return {**plain, "peft_type": self.method.upper(), "inference_mode": True}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that these options in a file describe; a method may refuse what only a live model can mean.

        Raises:
            ConfigError: a value is not allowed.
        """
        return cls(**values)


def config_from_dict(values: Mapping[str, Any], where: str = "adapter_config.json") -> AdapterConfig:
    """Build the configuration that PEFT's keys describe; what it asks for and is not implemented is refused by name.

    Raises:
        ConfigError: a value is not allowed, or a key asks for something that is not there.
    """
    peft_type = values.get("peft_type")
    if not isinstance(peft_type, str):
        raise ConfigError(
            f"{where}: 'peft_type' must name a method ({shown(m.upper() for m in registry.method_names())}), not {told(peft_type)}."
        )
    if peft_type.lower() not in registry.method_names():
        raise ConfigError(
            f"{where}: peft_type {told(peft_type)} is not implemented; known: {shown(m.upper() for m in registry.method_names())}."
        )
    cls: type[AdapterConfig] = registry.method_class(peft_type.lower()).config_class
    known = {f.name for f in dataclasses.fields(cls)}
    foreign = {key: value for key, value in values.items() if key not in known | _METADATA and not asks_nothing(value)}
    if foreign:
        asked = ", ".join(f"{key} = {told(value, 60)}" for key, value in foreign.items())
        raise ConfigError(f"{where} asks for {asked}, which minipeft does not implement for {peft_type}.")
    try:
        return cls.from_dict({key: value for key, value in values.items() if key in known - _METADATA})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _listed(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def asks_nothing(value: object) -> bool:
    """Whether a foreign value is a default that changes nothing: null, false, empty, or a mapping of such."""
    if isinstance(value, Mapping):
        return all(asks_nothing(item) for item in value.values())
    return value is None or value is False or value == [] or value == ""


# ------------------------------------------------------------------------------------------- checks on one value
def integer(name: str, value: object, at_least: int, at_most: int = 2**31) -> int:
    """An integer within bounds, no bool."""
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        raise ConfigError(f"{name} must be an integer from {at_least} to {at_most}, not {told(value)}.")
    return value


def number(
    name: str, value: object, above: float | None = None, at_least: float | None = None, below: float | None = None
) -> float:
    """A finite number within bounds, no bool."""
    bounds = [
        f"{sign} {bound:g}" for sign, bound in ((">", above), (">=", at_least), ("<", below)) if bound is not None
    ]
    if (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    ):  # NaN fails too
        if (
            (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (below is None or value < below)
        ):
            return value
    raise ConfigError(f"{name} must be a finite number {' and '.join(bounds)}, not {told(value)}.")


def flag(name: str, value: object) -> bool:
    """True or False and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {told(value)}.")
    return value


def one_of(name: str, value: object, allowed: Sequence[object]) -> Any:
    """One of the allowed values, of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        close = hint(value, [a for a in allowed if isinstance(a, str)]) if isinstance(value, str) else ""
        raise ConfigError(f"{name} must be one of {shown(allowed, 20)}, not {told(value)}{close}.")
    return value


def names(name: str, value: object) -> tuple[str, ...] | None:
    """A list of non-empty strings as a tuple without repeats; a set is sorted, so that files do not depend on hashing."""
    if value is None:
        return None
    entries = sorted(value, key=str) if isinstance(value, set | frozenset) else value
    if (
        not isinstance(entries, list | tuple)
        or not entries
        or not all(isinstance(entry, str) and entry for entry in entries)
    ):
        raise ConfigError(f"{name} must be a non-empty list of non-empty strings, not {told(value, 200)}.")
    return tuple(dict.fromkeys(entries))


def names_or_regex(name: str, value: object) -> tuple[str, ...] | str | None:
    """A list of suffixes, or a regular expression that compiles."""
    if isinstance(value, str):
        if not value:
            raise ConfigError(
                f"{name} is an empty string; give a list of suffixes such as ['c_attn'], or a regular expression."
            )
        compiled(value, name)
        return value
    return names(name, value)


def _layer_indices(name: str, value: object) -> tuple[int, ...]:
    """One index, or several in any collection that is no mapping and no text."""
    if isinstance(value, set | frozenset | Sequence) and not isinstance(value, str | bytes):
        indices = [integer(name, index, at_least=0) for index in value]
        return tuple(sorted(indices) if isinstance(value, set | frozenset) else indices)
    return (integer(name, value, at_least=0),)


def pattern_table(name: str, value: object, check: Any) -> dict[str, Any]:
    """A mapping from regular expressions to values that each pass `check(name, value)`, copied."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must map name patterns to values, not {told(value, 200)}.")
    for key, item in value.items():
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{name}: the key {told(key)} is not a name pattern.")
        compiled(key, name)
        check(f"{name}[{told(key)}]", item)
    return dict(value)
