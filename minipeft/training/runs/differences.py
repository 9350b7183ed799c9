"""What has changed in a configuration since a run began, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minipeft.training.runs.plain import same

SHOWN = 100  # characters of a value
_ABSENT = object()


def config_differences(saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Sequence[str] = ()) -> list[str]:
    """What has changed in a configuration: ``learning_rate: was 0.001, is 0.002``.

    Args:
        saved: as it was; nested dictionaries are compared key by key.
        now: as it is.
        may_differ: keys that are not compared, ``"a.b"`` for one within another; what is under such a key is free too.
    """
    return list(_differences(saved, now, may_differ, ""))


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Sequence[str], prefix: str) -> list[str]:
    found: list[str] = []
    for key in sorted(saved.keys() | now.keys()):
        name = f"{prefix}{key}"
        if name in may_differ:
            continue
        old, new = (side.get(key, _ABSENT) for side in (saved, now))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, may_differ, f"{name}.")
        elif not same(old, new):
            found.append(f"{name}: was {_short(old)}, is {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = "not set" if value is _ABSENT else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
