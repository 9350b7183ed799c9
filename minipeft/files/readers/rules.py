"""Rules: what a reader does with an adapter, and where that was read."""

from __future__ import annotations

import enum
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from minipeft.files.file_names import WEIGHTS_FILE
from minipeft.files.readers import facts
from minipeft.files.readers.contents import Contents
from minipeft.files.readers.names import Reader


class Takes(str, enum.Enum):
    """Whether a reader takes an adapter."""

    YES = "yes"
    PARTLY = "partly"  # it loads, with another effect than the adapter has
    NO = "no"
    NOTE = "note"  # it loads and is right, under a condition


# Short for the tables of rules: their most common consequences and fixes, in which READER stands for the rule's reader.
NO, PARTLY, NOTE = Takes.NO, Takes.PARTLY, Takes.NOTE
SILENTLY = "is left out without a word"
MERGE, SAVE_AGAIN = "minipeft merge", "load it with minipeft and save it again"
CONVERT = "minipeft convert DIR OUT --for READER"
WITHOUT_MODULES, WITHOUT_TOKENS = (f"{CONVERT} --drop {part}, or {MERGE}" for part in ("modules_to_save", "tokens"))


@dataclass(frozen=True)
class Rule:
    """One thing that a reader does with some adapters."""

    name: str  # short, for programs
    applies: Callable[[Contents], str | None]  # what of the adapter it is about, as the start of a sentence
    takes: Takes
    consequence: str  # the end of that sentence
    source: str  # the file of the reader, or page, that says so, and its version
    fix: str = ""


@dataclass(frozen=True)
class Finding:
    """A rule that applies, and to what."""

    rule: Rule
    what: str

    @property
    def reason(self) -> str:
        """One sentence without its full stop."""
        return f"{self.what} {self.rule.consequence}"


@dataclass(frozen=True)
class Answer:
    """Whether a reader takes an adapter, and why not."""

    reader: Reader
    findings: tuple[Finding, ...]

    @property
    def takes(self) -> Takes:
        """The worst that the findings say; notes do not count."""
        said = {finding.rule.takes for finding in self.findings}
        return next((answer for answer in (Takes.NO, Takes.PARTLY) if answer in said), Takes.YES)


def plain_lora(loading: str, configuration: str, *options: str) -> tuple[Rule, ...]:
    """What every reader of plain LoRA alone asks for first: the file, the method and the options that must be there.

    Args:
        loading: source of what it says of files.
        configuration: source of what it says of the configuration.
        options: that it needs; by default the rank, alpha and targets.
    """
    needed, other = options or ("r", "lora_alpha", "target_modules"), "is no LoRA, and no other method is read"
    return (
        Rule("format", facts.file_is_not(WEIGHTS_FILE), NO, "is not read", loading, "minipeft convert DIR OUT"),
        Rule("method", facts.methods_but("LORA"), NO, other, configuration, MERGE),
        Rule("options", facts.lacks(*needed), NO, "is required", configuration, CONVERT),
    )


@functools.cache
def rules_of(reader: Reader) -> Sequence[Rule]:
    """The rules of one reader, which has a module of its own in this package."""
    module = importlib.import_module(f"minipeft.files.readers.of_{reader.value.replace('.', '_')}")
    return [replace(rule, fix=rule.fix.replace("READER", reader.value)) for rule in module.RULES]


def answer(contents: Contents, reader: Reader) -> Answer:
    """Whether a reader takes this adapter, by its rules."""
    found = ((rule, rule.applies(contents)) for rule in rules_of(reader))
    return Answer(reader, tuple(Finding(rule, what) for rule, what in found if what is not None))
