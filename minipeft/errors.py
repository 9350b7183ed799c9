"""Errors: one family, whose messages say what is wrong, where, what is allowed and the nearest fix; and warnings."""

from __future__ import annotations

import difflib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
UNCHANGED = "Nothing was changed."
# What stands between a user's line and a warning: minipeft, and what calls models for others.
PASSED_THROUGH = {"accelerate", "contextlib", "importlib", "minipeft", "peft", "torch", "transformers", "trl"}
MAX_MESSAGE, MAX_ITEM = 2000, 200  # characters


class MinipeftError(Exception):
    """Base of every error that minipeft raises on purpose. The call that raised it has changed nothing.

    Names from files and from users get into messages, so a message is cut off at 2,000 characters and has no control
    characters, with which a terminal could be made to show something else.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(MinipeftError, ValueError):
    """A configuration value is not allowed."""


class RegistryError(MinipeftError, LookupError):
    """A method, layer or model type is unknown, or a registration breaks its contract."""


class TargetError(MinipeftError, ValueError):
    """A pattern names modules that do not exist or cannot be adapted."""


class OccupiedError(TargetError):
    """A module cannot have this adapter next to one that is there: one of them trains it, or all around it, in full."""


class StateError(MinipeftError, RuntimeError):
    """The call does not make sense in the current state of the model."""


class PeftOnlyError(StateError, AttributeError):
    """A function of PEFT's asks for what only PEFT's own objects have; for ``hasattr`` it is not there."""


class PeftNameError(MinipeftError, ImportError):
    """A name of PEFT's was imported from minipeft, which has another one for it, or needs none."""


class PeftAttributeError(MinipeftError, AttributeError):
    """The same where the name is looked up in the module; for ``hasattr`` it is not there."""


class CheckpointError(MinipeftError, ValueError):
    """An adapter file or a run's directory cannot be read, written or locked, or belongs to another model or run."""


class MergeError(MinipeftError, RuntimeError):
    """Folding adapters into the base weights would lose or corrupt something."""


class DataError(MinipeftError, ValueError):
    """Text or rows to train on cannot be found, read, or made into examples."""


class ExerciseError(MinipeftError, ValueError):
    """An exercise of `minipeft learn` does not exist, or the learner's file cannot be checked."""


class LeanError(MinipeftError, RuntimeError):
    """`minipeft.lean` would change what the model computes."""


class RequestError(MinipeftError, ValueError):
    """A server cannot answer a request.

    Args:
        message: the reason.
        status: of HTTP.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class ContractError(MinipeftError, AssertionError):
    """A method on a layer type breaks what the contract promises for every such pair.

    Args:
        method: name of the method, or "" if the fault is the layer's alone.
        layer: name of the layer type, or "".
        check: name of the check that failed.
        reason: what was seen.
    """

    def __init__(self, method: str, layer: str, check: str, reason: str) -> None:
        super().__init__(method, layer, check, reason)
        self.method, self.layer, self.check, self.reason = method, layer, check, reason

    def __str__(self) -> str:
        where = " on ".join(part for part in (self.method, self.layer) if part)
        return f"{where} fails {self.check!r}: {self.reason}"


def warn(message: str, *, ours: bool = False) -> None:
    """Warn, by the line of the user's program that led here.

    `ours`: by minipeft's own line, where a filter for minipeft's files finds what an adapter leaves out.
    """
    if ours:
        warnings.warn(message, stacklevel=2)
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in PASSED_THROUGH:
        frame = frame.f_back
    # Python's own name for code without one, such as that of `exec`; with None it would drop the warning.
    module = frame.f_globals.get("__name__") or "<string>"
    place = frame.f_code.co_filename, frame.f_lineno, module
    warnings.warn_explicit(message, UserWarning, *place, registry=frame.f_globals.setdefault("__warningregistry__", {}))


def all_or_nothing(verb: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public call that does all it says or nothing: its errors then end with ``Nothing was changed.``"""

    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except MinipeftError as error:
            message = str(error)
            if not message.endswith(UNCHANGED):  # one such call may make another
                error.args = (f"{message} {UNCHANGED}",)
            raise

    return call


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """Text for a message: cut in the middle if it is long, with invisible characters escaped, except line ends."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}[...]{text[-limit // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def shown(values: Iterable[object], limit: int = 5) -> str:
    """List values for a message, the first `limit` of them: ``'a', 'b' and 3 more``."""
    items = list(values)
    first = [
        told(item, MAX_ITEM) if isinstance(item, str) else printable(str(item), MAX_ITEM) for item in items[:limit]
    ]
    if len(items) > limit:
        return f"{', '.join(first)} and {len(items) - limit} more"
    return ", ".join(first) if first else "none"


def told(value: object, limit: int = 50) -> str:
    """Any value for a message, cut off; even one that Python cannot show, such as an integer with too many digits."""
    try:
        return f"{value!r:.{limit}}"
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"


def told_error(error: BaseException, limit: int = 200) -> str:
    """What an exception of another library says, to put into a sentence: its text, or its class if it has none."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return printable(" ".join(str(said).split()), limit).rstrip(".")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most similar to `name`, if any is close: more similar than `cutoff`, from 0 to 1."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def hint(name: str, known: Iterable[str]) -> str:
    """`` (closest: 'c_attn')`` for a message, or "" if no known name is close."""
    match = nearest(name, known)
    return f" (closest: {match!r})" if match else ""
