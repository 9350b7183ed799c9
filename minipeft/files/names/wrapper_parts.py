"""Keys without what wrappers and hand-written saves put around a name: prefixes, doubled ones, the adapter's name."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Collection, Sequence
from typing import TypeVar

from minipeft.ecosystem.wrapper_names import ATTRIBUTES, PREFIX, ROOT, unwrapped_name
from minipeft.files.tensor_file import TensorFile

logger = logging.getLogger("minipeft")
File = TypeVar("File", bound=TensorFile)
MAX_PARTS = 64  # of a key
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
VALUES = frozenset({"weight", "bias"})  # how keys end behind the adapter's name
_TRAINED_COPY = "modules_to_save"


def plain_name(key: str) -> str:
    """The name in a key without prefixes: PEFT's, once or twice or not there at all, and those of wrappers."""
    name = f".{key}".rpartition(f".{PREFIX}")[2].removeprefix(".")
    parts, wrappers = name.split("."), set(ATTRIBUTES.values())
    start = next((n for n, part in enumerate(parts) if part not in wrappers), 0)
    return unwrapped_name(".".join(parts[start:]))


def shared_key(key: str) -> str | None:
    """The key that a tensor has in PEFT's files if all layers share it, as ``base_model.vera_A``; None for a layer's own.

    The adapter's name may follow.
    """
    _, root, name = f".{key}".rpartition(f".{ROOT}")
    name = plain_name(name)
    own = root and name.count(".") <= 1 and not name.startswith(PREFIX.removeprefix(ROOT))
    return f"{ROOT}{name}" if own else None


def without_adapter_name(file: File, expected: Collection[str], in_full: Sequence[str] = ()) -> File:
    """The file without the adapter's name in its keys, as in ``lora_A.default.weight``, if it was written with it.

    A script that saves PEFT's ``state_dict()`` itself writes such keys. PEFT's own files do not have the name. Nor have
    they ``.weight`` after DoRA's magnitude, which PEFT keeps in a module. Before version 0.7 the bias of an adapted layer
    was its own, and not that of a ``base_layer``.

    Args:
        file: unread.
        expected: the keys that have a place.
        in_full: modules that are saved in full; a script may give these their own names, which are all that PEFT reads.
    """
    bare = {
        key: short
        for key in file.shapes
        if key not in expected
        for short in (_bare(key), _of_base(key))
        if short in expected and short not in file.shapes
    }
    file = file.renamed(lambda key: bare.get(key, key)) if bare else file
    others = [key for key in file.shapes if key not in expected]
    # In such a state all tensors of a method have the name, and only biases, which are the base's, do not.
    copies = tuple(f"{PREFIX}{name}." for name in in_full)
    if not all(key.endswith(".bias") or key.startswith(copies) for key in file.shapes.keys() - set(others)):
        return file
    names = next((names for key in others if (names := _possible(key, expected))), [])
    if len(names) != 1:
        return file
    name = names[0]
    renamed = {key: short for key in others for short in _short_forms(key, name) if short in expected}
    if renamed:
        logger.info("%s: the adapter's name %r was left out of %d keys", file.path.parent, name, len(renamed))
    return file.renamed(lambda key: renamed.get(key, key))


def _bare(key: str) -> str:
    """The key of a tensor that PEFT keeps in a module of its own, as its files have it."""
    bare = key.removesuffix(".weight")
    return key if bare.rpartition(".")[2] in VALUES else bare


def _of_base(key: str) -> str:
    """The key of a layer's bias as that of a layer that is adapted."""
    head, dot, tail = key.rpartition(".")
    return f"{head}.base_layer.bias" if dot and tail == "bias" else key


def _possible(key: str, expected: Collection[str]) -> list[str]:
    """The parts of a key without which it is expected."""
    parts = key.split(".", MAX_PARTS)
    names = [part for part in dict.fromkeys(parts[-3:] if len(parts) <= MAX_PARTS else ()) if part not in VALUES]
    names += [after for before, after in itertools.pairwise(parts) if before == _TRAINED_COPY]
    return [
        name
        for name in dict.fromkeys(names)
        if _ADAPTER_NAME.fullmatch(name) and any(short in expected for short in _short_forms(key, name))
    ]


def _short_forms(key: str, name: str) -> list[str]:
    """What a key is in PEFT's files, if `name` in it is the adapter's."""
    head, found, tail = f"{key}.".rpartition(f".{name}.")
    if not found:
        return []
    head, tail = head.removesuffix(f".{_TRAINED_COPY}"), tail.removesuffix(".")
    if not tail and head.rpartition(".")[2] in VALUES:
        return []
    short = f"{head}.{tail}" if tail else head
    return [short, _bare(short)] if tail == "weight" else [short]
