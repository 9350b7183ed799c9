"""The configuration of any method from the options that most methods share, under the name each has for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from minipeft.config.adapter_config import ALL_LINEAR, ALL_LINEAR_TEXT, AdapterConfig, config_class
from minipeft.errors import ConfigError, told_error

# The names that methods use for a shared option. Of those that a method has, the first counts.
NAMES: dict[str, tuple[str, ...]]
NAMES = {"rank": ("target_r", "r"), "alpha": ("lora_alpha", "alpha"), "dropout": ("lora_dropout", "vera_dropout")}
NAMES |= {"init": ("init_lora_weights", "init_weights"), "use_rslora": ("use_rslora",), "use_dora": ("use_dora",)}
WORDS = {"true": True, "false": False}  # of `init`
UNKNOWN_UPDATES = 2**31  # a stand-in for AdaLoRA's `total_step` until the updates are counted


def method_config(
    method: str,
    shared: Mapping[str, Any],
    *,
    target_modules: str | None = None,
    options: str | None = None,
    updates: int = 0,
) -> AdapterConfig:
    """The configuration of a method.

    Args:
        method: name of the method.
        shared: values for the keys of `NAMES`; None leaves the method's default.
        target_modules: names joined by commas, or ``"all-linear"`` or ``"all-linear-text"``; None leaves the defaults.
        options: further options of the method as a YAML mapping; they win.
        updates: number of updates of the run, for methods with a schedule; 0 if not known yet.

    Raises:
        ConfigError: the method does not have an option, or a value is not allowed.
        RegistryError: the method is unknown.
    """
    cls = config_class(method)
    known = {field.name for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {"target_modules": _targets(target_modules), "task_type": "CAUSAL_LM"}
    if "total_step" in known:
        values["total_step"] = updates or UNKNOWN_UPDATES
    values |= _named(method, known, shared)
    return cls(**values | _parsed(options or "{}"))


def check_agrees(
    config: AdapterConfig,
    where: str,
    method: str | None,
    shared: Mapping[str, Any],
    target_modules: str | None,
    options: str | None,
) -> None:
    """Raise ConfigError if what was given is not what an adapter's configuration says; the rest are as in `method_config`."""
    known = {field.name for field in dataclasses.fields(config)}
    if method not in (None, type(config).method):
        raise ConfigError(f"--method {method}: the adapter in {where} is {type(config).method}; leave it out.")
    given = _named(type(config).method, known, shared) | _parsed(options or "{}")
    if target_modules is not None:
        given["target_modules"] = _targets(target_modules)
    for name, value in given.items():
        own = getattr(config, name, None)
        same = set(own) == set(value) if isinstance(own, list | tuple) and isinstance(value, list) else own == value
        if not same:
            raise ConfigError(
                f"{name}={value!r}: the adapter in {where} has {own!r}, which counts; leave the flag out."
            )


def _named(method: str, known: Collection[str], shared: Mapping[str, Any]) -> dict[str, Any]:
    """The shared options that are given, by the method's names for them."""
    values = {}
    for flag, value in shared.items():
        name = next((name for name in NAMES[flag] if name in known), None)
        if name is None and value is not None:
            raise ConfigError(f"--{flag}: {method} has no such option; leave it out.")
        if name is not None and value is not None:
            values[name] = WORDS.get(value.lower(), value) if isinstance(value, str) else value
    return values


def _targets(text: str | None) -> str | list[str] | None:
    return text if text in (None, ALL_LINEAR, ALL_LINEAR_TEXT) else [name.strip() for name in text.split(",")]


def _parsed(text: str) -> dict[str, Any]:
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--method_options {text}: this is not YAML ({told_error(error)}).") from None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ConfigError(f"--method_options {text}: give a mapping, such as '{{init_r: 12}}'.")
    return options
