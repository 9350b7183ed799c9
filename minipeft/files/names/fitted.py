"""An adapter's file in the names of the model that it is loaded into."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from minipeft.errors import CheckpointError, told
from minipeft.files.format import AdapterFile
from minipeft.files.names.experts import fused_experts
from minipeft.files.names.key_mapping import MAX_NAME, published_names, renamed_by
from minipeft.files.names.modules import names_in_file
from minipeft.files.names.other_class import OtherClass
from minipeft.files.names.places import Places, Reading, is_shared
from minipeft.files.names.translated_config import translated_config
from minipeft.files.names.wrapper_parts import plain_name
from minipeft.injection.build import PREFIX
from minipeft.injection.module_tree import candidates

logger = logging.getLogger("minipeft")
TABLES = "transformers' tables of renamed weights"
MAX_TENSORS = 16  # of an adapter on one module; no other names give places to more


def in_names_of(
    model: nn.Module, file: AdapterFile, key_mapping: Mapping[str, str] | None = None, *, strict: bool = True
) -> AdapterFile:
    """The file under the model's names, its configuration too; as it is if its own names have places, or none do.

    Experts that it has one by one are put together first, see `minipeft.files.names.experts`.

    Own names come first, then those without what wrappers add, transformers' published tables, and the names of another
    class that has the same modules. A reading counts only if every tensor has a place then. The tensors' shapes are
    compared later, as those of any file.

    Args:
        model: only read.
        file: unread.
        key_mapping: regular expressions and replacements to apply first, as PEFT's.
        strict: False: some keys may be without a place.

    Raises:
        CheckpointError: the names may be read in two ways, or `key_mapping` leaves a key without a place, or gives two
            keys one place; or the experts do not fit.
        ConfigError: `key_mapping` is not a table, or takes too long.
    """
    found = candidates(model)
    file = fused_experts(file, model, found)
    places = Places(model, file.config, found)
    hopeless = len(file.shapes) > MAX_TENSORS * len(places.modules) or any(len(key) > MAX_NAME for key in file.shapes)
    if key_mapping is None and (all(map(places.takes, file.shapes)) or hopeless):
        return file
    plain = {key: plain_name(key) for key in file.shapes if not is_shared(key)}
    if key_mapping is not None:
        reading: Reading | None = _by_user(file, places, plain, key_mapping, strict)
    else:
        reading = _best(_readings(file, places, plain, strict), places, strict)
    if reading is None:
        return file
    _log(file, plain, reading)
    return _translated(file, places, plain, reading)


def _readings(file: AdapterFile, places: Places, plain: Mapping[str, str], strict: bool) -> Iterator[Reading]:
    """What the keys may mean, the surest first."""
    yield Reading(plain, "without the names of wrappers")
    published = published_names(places.model, plain)
    # An old name may by chance be another module's new one, so first all of them are renamed, and then the others only.
    own = {key: name if places.place(name) is not None else published[key] for key, name in plain.items()}
    yield Reading(published, TABLES)
    yield Reading(own, TABLES)
    other = OtherClass(places, file)
    for names in (own, dict(plain)):
        found = other.reading(names, partial=not strict)
        if found is not None:
            yield found


def _best(readings: Iterator[Reading], places: Places, strict: bool) -> Reading | None:
    """The first reading that gives every key a place; if not `strict`, else the first that gives more keys one."""
    tried: list[tuple[int, Reading]] = []
    for reading in readings:
        if len(set(reading.names.values())) < len(reading.names):
            continue  # two keys would get one name
        placed = sum(places.place(name) is not None for name in reading.names.values())
        if placed == len(reading.names):
            return reading
        tried.append((placed, reading))
    if strict or not tried:
        return None
    most, best = max(tried, key=lambda pair: pair[0])
    return best if most > tried[0][0] else None


def _by_user(
    file: AdapterFile, places: Places, plain: Mapping[str, str], key_mapping: Mapping[str, str], strict: bool
) -> Reading:
    reading = Reading(renamed_by(key_mapping, plain), "key_mapping")
    first: dict[str, str] = {}
    for key, name in reading.names.items():
        if first.setdefault(name, key) != key:
            raise CheckpointError(
                f"key_mapping gives {told(first[name], 200)} and {told(key, 200)} of {file.path} one place, "
                f"{told(name, 200)}."
            )
        if strict and places.place(name) is None:
            raise CheckpointError(
                f"key_mapping makes {told(key, 200)} of {file.path} {told(name, 200)}, and {type(places.model).__name__} "
                "has no such module."
            )
    return reading


def _translated(file: AdapterFile, places: Places, plain: Mapping[str, str], reading: Reading) -> AdapterFile:
    moved = [(plain[key], place) for key, name in reading.names.items() if (place := places.place(name)) is not None]
    renamed = file.renamed(lambda key: f"{PREFIX}{reading.names[key]}" if key in reading.names else key)
    if plain == reading.names:
        return renamed
    modules = names_in_file(places, moved, file.config)
    return replace(
        renamed,
        config=translated_config(file.config, modules),
        base={modules.renamed(name): row for name, row in file.base.items()},
        kept=tuple(map(modules.renamed, file.kept)),
    )


def _log(file: AdapterFile, plain: Mapping[str, str], reading: Reading) -> None:
    changed = [key for key, name in reading.names.items() if key != f"{PREFIX}{name}"]
    if changed:
        logger.info(
            "%s: %d of %d tensors were renamed (%s), such as %s to %s",
            file.path.parent,
            len(changed),
            len(file.shapes),
            reading.rule,
            told(changed[0], 200),
            told(f"{PREFIX}{reading.names[changed[0]]}", 200),
        )
