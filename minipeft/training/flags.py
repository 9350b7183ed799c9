"""Command-line flags from a dataclass: each flag is one field, with its default, help, bounds and what it excludes.

    @dataclass(frozen=True)
    class Flags:
        rank: int | None = flag(None, "rank of the update")
        batch_size: int = flag(8, "examples per forward pass", lowest=1)

    flags = parse_flags(Flags, sys.argv[1:], "What the program does.")

The type of the field decides how the flag is written: ``bool`` is a switch, ``bool | None`` is a pair ``--x`` and
``--no-x``, a ``Literal`` takes one of its values, and any other type converts the word that follows.
"""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from minipeft.errors import ConfigError, hint, told_error

T = TypeVar("T")
LIMIT = 2**31  # numpy's seeds, torch's sizes and the rates of its optimizers stay below it


@dataclass(frozen=True)
class Rules:
    """What a flag says about itself besides its type and its default."""

    help: str  # text for ``--help``, to which the default is added
    lowest: float | None = None  # smallest number allowed
    above: float | None = None  # a number must be larger than this
    const: str | None = None  # value if the flag is given without one
    must_exist: bool = False  # whether the path must exist
    not_with: tuple[str, ...] = ()  # flags that cannot be given together with this one
    needs: tuple[str, ...] = ()  # flags of which at least one must be given too
    # Whether the flag may change when a run goes on, because it does not affect what is computed
    may_change: bool = False
    also: str | None = None  # another name for the flag, which other trainers have
    # Whether the flag is for this start of a run only, so that the run's configuration leaves it out
    once: bool = False


def flag(default: Any, help: str, **rules: Any) -> Any:
    """A field of a dataclass of flags; `rules` are the attributes of `Rules`."""
    return dataclasses.field(default=default, metadata={"rules": Rules(help, **rules)})


def parse_flags(cls: type[T], words: Sequence[str], description: str | None) -> T:
    """Parse and check flags. If the dataclass has a field `config`, it names a YAML file of flags, which `words` override.

    Args:
        cls: dataclass of fields made by `flag`.
        words: command line without the program's name.
        description: text at the top of ``--help``.

    Raises:
        ConfigError: a flag is unknown, its value is not allowed, or it does not go with another one.
    """
    parser = _make_parser(cls, description)
    values = vars(parser.parse_args(words))
    if values.get("config") is not None:
        values = vars(parser.parse_args([*_words_in(values["config"], cls), *words]))
    flags = cls(**values)
    for name, rules in _rules(flags):
        if getattr(flags, name) is not None:
            _check_value(name, getattr(flags, name), rules)
        if _is_given(flags, name):
            _check_company(flags, name, rules)
    return flags


def compared_values(flags: object) -> dict[str, Any]:
    """Values of the flags that must be the same when a run goes on, as JSON can hold them."""
    return {name: _plain(getattr(flags, name)) for name, rules in _rules(flags) if not (rules.may_change or rules.once)}


def saved_values(flags: object) -> dict[str, Any]:
    """Values of the flags that start the same run again, as JSON and YAML can hold them."""
    return {name: _plain(getattr(flags, name)) for name, rules in _rules(flags) if not rules.once}


class _Parser(ArgumentParser):
    """A parser that raises minipeft's errors instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags.")


def _make_parser(cls: Any, description: str | None) -> _Parser:
    parser = _Parser(description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    types = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        rules, text = field.metadata["rules"], field.metadata["rules"].help
        if not (field.default is None or field.default is False or "(default" in text):
            text += f" (default: {field.default})"
        options = _options(types[field.name], rules)
        words = [f"--{name}" for name in (field.name, rules.also) if name]
        parser.add_argument(*words, dest=field.name, default=field.default, help=text.replace("%", "%%"), **options)
    return parser


def _options(annotation: Any, rules: Rules) -> dict[str, Any]:
    """What argparse must know about a flag of this type."""
    optional = get_origin(annotation) in (Union, UnionType)
    kind = next(part for part in get_args(annotation) if part is not NoneType) if optional else annotation
    if kind is bool:
        return {"action": BooleanOptionalAction if optional else "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    return {"type": kind} if rules.const is None else {"type": kind, "nargs": "?", "const": rules.const}


def _words_in(file: Path, cls: Any) -> Iterator[str]:
    """The flags of a YAML file as a command line gives them."""
    try:
        values = yaml.safe_load(file.read_text("utf-8")) or {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: cannot be read as YAML ({told_error(error)}).") from None
    if not isinstance(values, dict) or not all(isinstance(v, str | int | float | None) for v in values.values()):
        raise ConfigError(f"--config {file}: give one value per flag, such as 'rank: 8'.")
    pairs = {name for name, kind in get_type_hints(cls).items() if kind == bool | None}
    fields = dataclasses.fields(cls)
    names = {name: field.name for field in fields for name in (field.name, field.metadata["rules"].also) if name}
    given: dict[str, str] = {}
    for word, value in values.items():
        name = names.get(word)
        if name is None:
            raise ConfigError(
                f"--config {file}: there is no flag --{word}{hint(str(word), names)}; --help lists the flags."
            )
        if given.setdefault(name, word) != word:
            raise ConfigError(f"--config {file}: {given[name]} and {word} are the same flag; give one of them.")
        if value is True:
            yield f"--{name}"
        elif value is False and name in pairs:
            yield f"--no-{name}"
        elif value is not None and value is not False:
            yield f"--{name}={value}"


def _rules(flags: Any) -> Iterator[tuple[str, Rules]]:
    for field in dataclasses.fields(flags):
        yield field.name, field.metadata["rules"]


def _check_value(name: str, value: Any, rules: Rules) -> None:
    if rules.must_exist and not value.exists():
        raise ConfigError(f"--{name} {value}: no such file or folder.")
    if rules.lowest is None and rules.above is None:
        return
    high_enough = value > rules.above if rules.above is not None else value >= rules.lowest
    if not (high_enough and value < LIMIT):
        start = f"above {rules.above}" if rules.above is not None else f"from {rules.lowest}"
        below = f" and below {LIMIT}" if value >= LIMIT else ""
        end = f" to {LIMIT - 1}" if isinstance(value, int) else below
        raise ConfigError(f"--{name} {value}: give a number {start}{end}.")


def _check_company(flags: object, name: str, rules: Rules) -> None:
    for other in rules.not_with:
        if _is_given(flags, other):
            raise ConfigError(f"--{name} and --{other} exclude each other; give one of them.")
    if rules.needs and not any(_is_given(flags, other) for other in rules.needs):
        raise ConfigError(f"--{name} needs {' or '.join(f'--{other}' for other in rules.needs)}; give both.")


def _is_given(flags: Any, name: str) -> bool:
    return bool(getattr(flags, name) != getattr(type(flags), name))  # which is the default


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
