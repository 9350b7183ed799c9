"""Entries of ``modules_to_save`` in files, where they mean what they mean to PEFT.

In a configuration of ours an entry is a suffix at a dot boundary. PEFT trains every module whose name ends with the entry:
``classifier`` takes DistilBERT's ``pre_classifier`` along, and the file holds both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from minipeft.config import HEADS_OF_TASK
from minipeft.files.format import AdapterFile
from minipeft.injection.module_tree import Candidate, candidates
from minipeft.injection.targets import within
from minipeft.patterns import is_suffix


def as_peft_reads(file: AdapterFile, model: nn.Module) -> AdapterFile:
    """A file whose `modules_to_save` names every module that PEFT would train; a file of ours as it is."""
    config = file.config
    entries = (*(config.modules_to_save or ()), *HEADS_OF_TASK.get(config.task_type or "", ()))
    more = [] if file.is_own or not entries else _strays(candidates(model), entries)
    entries = (*(config.modules_to_save or ()), *more)
    return replace(file, config=replace(config, modules_to_save=entries)) if more else file


def for_peft(model: nn.Module, entries: Sequence[str], saved: Sequence[str]) -> list[str]:
    """Entries for a file that name these modules, and no others to PEFT if there are such entries.

    There are none for a module without a parent, such as ``classifier`` next to ``pre_classifier``. PEFT then copies the
    base's ``pre_classifier``, which is not in the file, so its outputs are the same.
    """
    # An entry for a module inside another entry's module would match nothing when the file is read.
    used = [entry for entry in entries if any(is_suffix(entry, name) for name in saved)]
    stray = {name for name in _strays(candidates(model), used) if not within(name, saved)}
    used = [entry for entry in used if not any(name.endswith(entry) for name in stray)]
    # An entry may also be a name with a wrapper's part in it.
    return used + [name for name in saved if not any(is_suffix(entry, name) for entry in used)]


def _strays(found: Mapping[str, Candidate], entries: Sequence[str]) -> list[str]:
    """Modules whose name ends with one of these entries, but not at a dot boundary."""
    endings = tuple(entries)
    return [
        first
        for first, candidate in found.items()
        if any(name.endswith(endings) for name in candidate.names)
        and not any(is_suffix(entry, name) for name in candidate.names for entry in entries)
    ]
