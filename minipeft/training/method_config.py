"""The configuration of any method from the options that most methods share, under the name each has for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from minipeft import registry
from minipeft.config import AdapterConfig
from minipeft.errors import ConfigError

# The names that methods use for a shared option. Of those that a method has, the first counts.
NAMES = {"rank": ("target_r", "r"), "alpha": ("lora_alpha", "alpha"), "dropout": ("lora_dropout", "vera_dropout")}
UNKNOWN_UPDATES = 2**31  # a stand-in for AdaLoRA's `total_step` until the updates are counted


def method_config(
    method: str,
    shared: Mapping[str, float | None],
    *,
    target_modules: str | None = None,
    options: str | None = None,
    updates: int = 0,
) -> AdapterConfig:
    """The configuration of a method.

    Args:
        method: name of the method.
        shared: ``rank``, ``alpha`` and ``dropout``; None leaves the method's default.
        target_modules: names joined by commas, or ``"all-linear"``; None leaves the defaults.
        options: further options of the method as a YAML mapping; they win.
        updates: number of updates of the run, for methods with a schedule; 0 if not known yet.

    Raises:
        ConfigError: the method does not have an option, or a value is not allowed.
        RegistryError: the method is unknown.
    """
    registry.load_plugins()
    cls = registry.method_class(method).config_class
    known = {field.name for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {"target_modules": _targets(target_modules), "task_type": "CAUSAL_LM"}
    if "total_step" in known:
        values["total_step"] = updates or UNKNOWN_UPDATES
    for flag, value in shared.items():
        name = next((name for name in NAMES[flag] if name in known), None)
        if name is None and value is not None:
            raise ConfigError(f"--{flag}: {method} has no such option; leave it out.")
        if name is not None and value is not None:
            values[name] = value
    return cls(**values | _parsed(options or "{}"))


def _targets(text: str | None) -> str | list[str] | None:
    return text if text in (None, "all-linear") else [name.strip() for name in text.split(",")]


def _parsed(text: str) -> dict[str, Any]:
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--method_options {text}: this is not YAML ({reason}).") from None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ConfigError(f"--method_options {text}: give a mapping, such as '{{init_r: 12}}'.")
    return options
