"""Adapter configuration: a frozen dataclass, checked when built, to and from PEFT's ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Self

from minipeft.config.options import flag, layer_indices, names, names_or_regex, one_of
from minipeft.config.patterns import first_keys
from minipeft.ecosystem.peft_options import OPTIONS, WITHOUT_EFFECT, checked_other_keys, other_keys, read_value
from minipeft.errors import ConfigError, PeftOnlyError, hint, shown, told
from minipeft.registry import registry

ALL_LINEAR = "all-linear"
ALL_LINEAR_TEXT = "all-linear-text"
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# Heads that PEFT trains in full for these tasks, if the model has them.
HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
STATES = (
    "PEFT's get_peft_model_state_dict and set_peft_model_state_dict know PEFT's models alone: use "
    "model.get_adapter_state_dict() and model.set_adapter_state_dict(state)"
)
READ = "minipeft.load_config(directory) reads the configuration of an adapter"
OF_FILES = frozenset({"auto_mapping", "peft_type", "peft_version", "revision"})
# What a configuration has in PEFT and not here -> what to do. PEFT's functions for a model's state ask for the first two.
OF_PEFT = {
    "is_prompt_learning": STATES,
    "peft_type": f"the method is config.method. {STATES}",
    "from_pretrained": READ,
    "from_json_file": READ,
    "save_pretrained": "model.save_pretrained(directory) writes the configuration with its adapter",
    "_register_custom_module": "minipeft.register_layer registers a layer type, for every method",
}


class _KnownNames(type):
    """Turns an unknown or misspelt option into a `ConfigError` that names the nearest one."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                why = hint(name, known)
                if name in OF_FILES:
                    raise ConfigError(f"{cls.__name__} has no option {name!r}, which only a file has; {READ}.")
                if name in OPTIONS:
                    why = ", which is PEFT's and not implemented for this method"
                raise ConfigError(f"{cls.__name__} has no option {name!r}{why}; known: {', '.join(known)}.")
        return super().__call__(*args, **options)

    def __getattr__(cls, name: str) -> Any:
        raise _absent(cls.__name__, name)


def _absent(where: str, name: str) -> AttributeError:
    """The error for an attribute that a configuration does not have."""
    if name in OF_PEFT:
        return PeftOnlyError(f"{where} has no {name}, which is PEFT's; {OF_PEFT[name]}.")
    return AttributeError(f"{where} has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(metaclass=_KnownNames):
    """The options of every method: which modules it adapts, and what is trained besides. Names and meanings are PEFT's.

    Args:
        target_modules: suffixes at a dot boundary (``["c_attn"]``), one regular expression for the whole name, or
            ``"all-linear"``, which leaves the output head out, or ``"all-linear-text"``, which also leaves out the towers
            that see or hear, and what joins them to the text. None: the default for the model's ``model_type``. It
            may be empty if bare parameters are adapted.
        exclude_modules: suffixes, or one regular expression; overrides `target_modules`.
        layers_to_transform: layer indices to keep, with `target_modules` a list.
        layers_pattern: name of the module list that the indices count, such as ``"h"``; None: the first number in a name.
        modules_to_save: suffixes of modules that are copied, trained and saved in full.
        task_type: one of `TASK_TYPES`; a classification task also trains in full its head and what else the base's
            checkpoint lacks, see `minipeft.injection.fresh_parts`.
        base_model_name_or_path: written to the file; None: the model's own ``name_or_path``.
        inference_mode: add the adapter frozen.
        other_keys: keys of a file that ask for nothing, such as a tool's bookkeeping; written back on saving.

    In a file null or an empty list may stand for the default, and `modules_to_save` may match by mere endings, as in PEFT.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or an option does not exist.
    """

    method: ClassVar[str]
    not_in_files: ClassVar[frozenset[str]] = frozenset()  # options below that PEFT's class of this method lacks
    null_in_files: ClassVar[frozenset[str]] = frozenset()  # numbers that act in training only; null is the default
    empty_in_files: ClassVar[frozenset[str]] = frozenset({"target_modules"})  # options of which [] does not mean None
    # Table from name patterns to values -> the option it sets per module
    pattern_options: ClassVar[Mapping[str, str]] = {}

    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    other_keys: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        raise _absent(type(self).__name__, name)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            none = name == "target_modules" and self.target_parameters and getattr(self, name) in ([], ())
            self._set(name, () if none else names_or_regex(name, getattr(self, name)))
        if isinstance(self.target_modules, str) and self.target_modules.lower() in (ALL_LINEAR, ALL_LINEAR_TEXT):
            self._set("target_modules", self.target_modules.lower())
        self._set("modules_to_save", names("modules_to_save", self.modules_to_save))
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        self._set("layers_pattern", names("layers_pattern", patterns))
        indices = self.layers_to_transform
        if indices is not None:
            self._set("layers_to_transform", layer_indices("layers_to_transform", indices))
            if isinstance(self.target_modules, str):
                raise ConfigError(
                    "layers_to_transform needs target_modules as a list; a regular expression can name the layers itself."
                )
        if self.layers_pattern is not None and indices is None:
            raise ConfigError("layers_pattern needs layers_to_transform, the indices to keep.")
        task = self.task_type.value if isinstance(self.task_type, enum.Enum) else self.task_type
        self._set("task_type", None if task is None else one_of("task_type", task, TASK_TYPES))
        if self.base_model_name_or_path is not None and not isinstance(self.base_model_name_or_path, str):
            raise ConfigError(
                f"base_model_name_or_path must be a string or None, not {told(self.base_model_name_or_path)}."
            )
        for option in dataclasses.fields(self):
            if option.type in ("bool", bool):  # those of a method too
                flag(option.name, getattr(self, option.name))
        self._set("other_keys", checked_other_keys(self.other_keys))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the only way to set a field while a frozen dataclass is being built

    # What a method may say with its options. Those that PEFT names keep PEFT's names.

    @property
    def adapter_method(self) -> str:
        """The registered method whose class adapts; an option may choose a variant of `method`, such as "dora"."""
        return self.method

    @property
    def bias(self) -> str:
        """With "all", the biases of modules that are not adapted train too."""
        return "none"

    @property
    def ensure_weight_tying(self) -> bool:
        """Whether layers tied to an embedding are adapted, or trained in full, along with it."""
        return False

    @property
    def target_parameters(self) -> Sequence[str] | None:
        """Suffixes of the names of bare parameters to adapt, for a method that has the option."""
        return None

    def needs_a_call(self) -> list[str]:
        """Options in use that act on a layer's input or output: they cannot work on a weight that is read, not called."""
        return []

    def companions(self) -> Sequence[tuple[str, AdapterConfig]]:
        """Configurations of other methods to apply besides this one, each with a prefix for its keys in a file.

        No module is adapted by both.
        """
        return ()

    def default_modules(self, model: nn.Module) -> Sequence[str] | None:
        """The modules to adapt if `target_modules` is None; None: those registered for the model's ``model_type``.

        Raises:
            TargetError: the model has no such modules.
        """
        return None

    def for_modules(self, names: Sequence[str]) -> dict[str, Self]:
        """The configuration for each of the targeted modules; by default as `pattern_options` says."""
        if not any(getattr(self, table) for table in self.pattern_options):
            return dict.fromkeys(names, self)
        found, made, configs = self._deciding_keys(names), dict[str, Self](), {}
        for name in names:
            keys = {table: key.get(name) for table, key in found.items()}
            # By value, of which there are few even with a key per module: making a configuration checks all of it.
            values = repr([None if key is None else getattr(self, table)[key] for table, key in keys.items()])
            if values not in made:
                made[values] = self._with_values(keys)
            configs[name] = made[values]
        return configs

    def unused_options(self, names: Sequence[str]) -> list[str]:
        """Per-module options that apply to none of the targeted modules, as ``option: key``."""
        used = {table: set(keys.values()) for table, keys in self._deciding_keys(names).items()}
        return [f"{table}: {key}" for table in used for key in getattr(self, table) if key not in used[table]]

    def _deciding_keys(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """For each table of `pattern_options`: module name -> the key that decides for it."""
        return {table: first_keys(getattr(self, table), names, table) for table in self.pattern_options}

    def _with_values(self, keys: Mapping[str, str | None]) -> Self:
        """The configuration of the modules to which these keys apply, by table."""
        values: dict[str, Any] = {table: {} for table in keys}
        values |= {
            self.pattern_options[table]: getattr(self, table)[key] for table, key in keys.items() if key is not None
        }
        return dataclasses.replace(self, **values)

    def for_model_type(self, model_type: str | None) -> Self:
        """The configuration with the defaults that are registered for this method and model type, where it says None."""
        unset = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is None]
        defaults = {name: registry.targets_of(model_type, self.method, name) for name in unset}
        given: dict[str, Any] = {name: patterns for name, patterns in defaults.items() if patterns is not None}
        return dataclasses.replace(self, **given) if given else self

    def to_dict(self) -> dict[str, Any]:
        """PEFT's keys, JSON-ready; ``inference_mode`` is always written as true, as PEFT does."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: _listed(v) for k, v in values.items() if k not in self.not_in_files and k != "other_keys"}
        # Last, as a file has them after the first save, so that the same adapter gives the same bytes.
        return {**plain, "peft_type": self.method.upper(), "inference_mode": True, **self.other_keys}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that these options in a file describe; a method may refuse those that only make sense for a live model.

        Raises:
            ConfigError: a value is not allowed.
        """
        return cls(**values)


def checked_config(config: object) -> AdapterConfig:
    """The configuration of a method, minipeft's or PEFT's; raises ConfigError if it is anything else."""
    own = config_of_peft(config)
    if not isinstance(own, AdapterConfig) or not hasattr(type(own), "method"):
        raise ConfigError(f"config must be the configuration of a method, such as LoraConfig, not {own!r:.100}.")
    return own


def config_of_peft(config: object) -> object:
    """What a configuration object of PEFT's says, as one of minipeft's; anything else as it is.

    Raises:
        ConfigError: it asks for something that is not implemented.
    """
    own_or_class = isinstance(config, AdapterConfig | type)
    if own_or_class or not hasattr(config, "peft_type") or not hasattr(config, "to_dict"):
        return config
    layers = (getattr(config, "_custom_modules", None) or {}).items()
    if foreign := [
        kind.__name__ for kind, made in layers if not getattr(made, "__module__", "").startswith("minipeft.")
    ]:
        raise ConfigError(
            f"{type(config).__name__}: _register_custom_module gives PEFT layers of its own for {shown(foreign)}; here a "
            "layer type is registered with register_layer, and a method for some layers with register_adapter."
        )
    said = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    said["peft_type"] = getattr(config.peft_type, "value", config.peft_type)
    own = config_from_dict(said, type(config).__name__, live=True)
    return dataclasses.replace(own, inference_mode=bool(said.get("inference_mode")))


def config_class(method: str) -> type[Any]:
    """The configuration class of a method, built in or a plugin's.

    Raises:
        RegistryError: the method is unknown.
    """
    registry.load_plugins()
    return registry.method_class(method).config_class


def config_from_dict(
    values: Mapping[str, Any], where: str = "adapter_config.json", *, live: bool = False
) -> AdapterConfig:
    """Build the configuration that PEFT's keys describe, and refuse by name what is not implemented.

    Args:
        values: by PEFT's names.
        where: they were found, for messages.
        live: they are for a model that is about to be adapted, and not for a file that holds its values.

    Raises:
        ConfigError: a value is not allowed, or a key asks for something that is not implemented.
    """
    registry.load_plugins()
    classes = {name: registry.method_class(name).config_class for name in registry.method_names()}
    # A variant, as DoRA is one of LoRA, stands in files as the method whose options choose it.
    known_types = {name.upper(): cls for name, cls in classes.items() if cls.method == name}
    peft_type = values.get("peft_type")
    if not isinstance(peft_type, str):
        raise ConfigError(f"{where}: 'peft_type' must name a method ({shown(known_types)}), not {told(peft_type)}.")
    if peft_type.upper() not in known_types:
        raise ConfigError(f"{where}: peft_type {told(peft_type)} is not implemented; known: {shown(known_types)}.")
    cls: type[AdapterConfig] = known_types[peft_type.upper()]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in {*WITHOUT_EFFECT, "other_keys"}}
    try:
        others = other_keys(values, fields, cls.method)
        read = {**_read_options(cls, fields, values), "other_keys": {} if live else others}
        return cls(**read) if live else cls.from_dict(read)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read_options(
    cls: type[AdapterConfig], fields: Mapping[str, dataclasses.Field[Any]], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that a file sets. A value that asks for nothing becomes the class's own value for that."""
    read = {name: values[name] for name in fields if name in values}
    for name, value in read.items():
        factory = fields[name].default_factory
        default = fields[name].default if factory is dataclasses.MISSING else factory()
        if default is not dataclasses.MISSING and (value is None or name not in cls.empty_in_files):
            read[name] = read_value(value, default, null_is_default=name in cls.null_in_files)
    return read


def _listed(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
