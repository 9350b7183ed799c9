"""An adapter's file in the names of the model that it is loaded into."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from minipeft.config.patterns import MAX_EXPRESSIONS, SECONDS_PER_OPTION, compiled
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import CheckpointError, ConfigError, told, told_error
from minipeft.files.format import AdapterFile
from minipeft.files.names.conversions import conversions
from minipeft.files.names.experts.fused import fused_experts
from minipeft.files.names.modules import names_in_file
from minipeft.files.names.other_class import OtherClass
from minipeft.files.names.places import Places, Reading
from minipeft.files.names.translated_config import translated_config
from minipeft.files.names.wrapper_parts import plain_name, shared_key
from minipeft.injection.module_tree import Candidate, candidates

logger = logging.getLogger("minipeft")
PUBLISHED = "transformers' tables of renamed weights"
MAX_TENSORS = 16  # of an adapter on one module; no other names give places to more
MAX_NAME = 2000  # characters that a name may have after it was replaced
# Where the part of an adapter begins in a name; what stands before it is a module's.
_ADAPTER = re.compile(r"(.+?)\.((?:hada|ia3|lokr|lora|oft|vera)_.*|base_layer\..*)")


def in_names_of(
    model: nn.Module,
    file: AdapterFile,
    key_mapping: Mapping[str, str] | None = None,
    *,
    strict: bool = True,
    found: dict[str, Candidate] | None = None,
) -> AdapterFile:
    """The file under the model's names, its configuration too; as it is if its own names have places, or no reading fits.

    `minipeft.files.names` lists the readings. One counts only if every tensor has a place then. The tensors' shapes are
    compared later, as those of any file.

    Args:
        model: only read.
        file: unread.
        key_mapping: regular expressions and replacements to apply first, as PEFT's.
        strict: False: some keys may be without a place.
        found: the model's `candidates`, if they have been found already.

    Raises:
        CheckpointError: the names may be read in two ways, or `key_mapping` leaves a key without a place, or gives two
            keys one place; or the experts do not fit.
        ConfigError: `key_mapping` is not a table, or takes too long.
    """
    found = candidates(model) if found is None else found
    file = fused_experts(file, model, found)
    places = Places(model, file.config, found)
    hopeless = len(file.shapes) > MAX_TENSORS * len(places.modules) or any(len(key) > MAX_NAME for key in file.shapes)
    if key_mapping is None and (all(map(places.takes, file.shapes)) or hopeless):
        return file
    file = file.renamed(lambda key: key if places.takes(key) else shared_key(key) or key)
    plain = {key: plain_name(key) for key in file.shapes if shared_key(key) != key}
    if key_mapping is not None:
        reading: Reading | None = _by_user(file, places, plain, key_mapping, strict)
    else:
        reading = _best(_readings(file, places, plain, strict), places, strict)
    if reading is None:
        return file
    _log(file, reading)
    return _translated(file, places, plain, reading)


def _readings(file: AdapterFile, places: Places, plain: Mapping[str, str], strict: bool) -> Iterator[Reading]:
    """What the keys may mean, the surest first."""
    yield Reading(plain, "without the names of wrappers")
    published = _published_names(places.model, plain)
    yield Reading(published, PUBLISHED)
    # An old name may by chance be another module's new one, so a name that has a place is renamed above, and kept here.
    own = {key: name if places.place(name) is not None else published[key] for key, name in plain.items()}
    yield Reading(own, PUBLISHED)
    other = OtherClass(places, file)
    for names in (own, plain):  # the tables spoil some names of today, such as Laguna's shared experts
        if (found := other.reading(names, partial=not strict)) is not None:
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
    reading = Reading(_renamed_by(key_mapping, plain), "key_mapping")
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
    modules = names_in_file(places, moved)
    return replace(
        renamed,
        config=translated_config(file.config, modules),
        base={modules.renamed(name): row for name, row in file.base.items()},
        kept=tuple(map(modules.renamed, file.kept)),
    )


def _log(file: AdapterFile, reading: Reading) -> None:
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


def _renamed_by(mapping: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """The names, by key, with the first expression that is found in each replaced everywhere in it.

    Raises:
        ConfigError: the table is not one of expressions to replacements, or takes longer than two seconds.
    """
    _check_mapping(mapping)
    table = [(pattern, compiled(pattern, "key_mapping"), replacement) for pattern, replacement in mapping.items()]
    end, renamed = time.thread_time() + SECONDS_PER_OPTION, {}
    for key, name in names.items():
        for pattern, expression, replacement in table:
            try:
                new, count = expression.subn(replacement, name, timeout=max(end - time.thread_time(), 0.001))
            except TimeoutError:
                raise ConfigError(
                    f"key_mapping: {told(pattern, 100)} takes more than {SECONDS_PER_OPTION:g} s."
                ) from None
            except Exception as error:  # the engine's own, as for a group that is not there
                raise ConfigError(
                    f"key_mapping: {told(replacement, 100)} cannot replace ({told_error(error)})."
                ) from None
            if count:
                name = new
                break
        if len(name) > MAX_NAME and name != names[key]:
            raise ConfigError(f"key_mapping makes a name of {len(name):,} characters; {MAX_NAME:,} are allowed.")
        renamed[key] = name
    return renamed


def _check_mapping(mapping: object) -> None:
    if not isinstance(mapping, Mapping) or not all(isinstance(text, str) for pair in mapping.items() for text in pair):
        raise ConfigError(
            f"key_mapping must map regular expressions to replacements, such as "
            f"{{'^language_model.model': 'model.language_model'}}, not {told(mapping, 100)}."
        )
    if len(mapping) > MAX_EXPRESSIONS:
        raise ConfigError(f"key_mapping has {len(mapping):,} entries; {MAX_EXPRESSIONS} are allowed.")


def _published_names(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """The names of a file, by key, as transformers' tables of renamed weights have them for a model."""
    renamings, _ = conversions(model)
    return {key: _renamed(name, renamings) for key, name in names.items()} if renamings else dict(names)


def _renamed(name: str, renamings: list[Any]) -> str:
    """The name today. A table may speak of the weight, as of ``.gate.weight``, so a module is asked for by that."""
    match = _ADAPTER.fullmatch(name)
    asked = f"{match[1]}.weight" if match else name
    for renaming in renamings:
        asked = renaming.rename_source_key(asked)[0]
    return f"{asked.removesuffix('.weight')}.{match[2]}" if match else asked
