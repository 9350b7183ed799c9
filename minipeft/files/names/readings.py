"""A reading: under which name of the model each key of a file belongs, by one rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minipeft.files.names.places import Places


@dataclass(frozen=True)
class Reading:
    """Keys of a file -> names of the model's, both with what follows the module's name."""

    names: Mapping[str, str]
    rule: str  # what was done, for the log

    def fits(self, places: Places) -> bool:
        """Whether every name has a place."""
        return all(places.place(name) is not None for name in self.names.values())

    def placed(self, places: Places) -> int:
        """How many of the names have a place."""
        return sum(places.place(name) is not None for name in self.names.values())

    def is_injective(self) -> bool:
        """Whether no two keys get one name."""
        return len(set(self.names.values())) == len(self.names)
