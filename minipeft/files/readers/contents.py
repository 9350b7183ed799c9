"""What an adapter's directory holds, read without a model and without asking whether this library implements it."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipeft.config.patterns import first_keys, matching, selected
from minipeft.ecosystem.older_peft import in_todays_words
from minipeft.errors import CheckpointError, shown
from minipeft.files.file_names import CONFIG_FILE, OF_OTHER_TOOLS, WEIGHTS_FILE
from minipeft.files.formats.known import pickles_in
from minipeft.files.not_an_adapter import folder_named, local_names
from minipeft.files.readers.keys import Key, Kind, taken_apart
from minipeft.files.reading import read_object, reading
from minipeft.files.tensor_file import TensorFile, open_tensors

FILES = (WEIGHTS_FILE, *OF_OTHER_TOOLS)
MAX_NUMBER = 2**53  # of a rank or an alpha
# For one layer of a method: the options for its rank and for what its update is multiplied with.
RANKS = {
    "LORA": ("r", "lora_alpha"),
    "LOHA": ("r", "alpha"),
    "LOKR": ("r", "alpha"),
    "ADALORA": ("init_r", "lora_alpha"),
}


@dataclass(frozen=True)
class Contents:
    """The configuration and the header of the weights."""

    directory: Path
    config: Mapping[str, Any]  # ``adapter_config.json`` as today's PEFT would have written it; empty if there is none
    weights: TensorFile
    stored: Mapping[str, Any] = field(default_factory=dict)  # ``adapter_config.json`` as it stands there

    @property
    def method(self) -> str:
        """``peft_type`` in capitals, or "" if the configuration names none."""
        method = self.config.get("peft_type")
        return method.upper() if isinstance(method, str) else ""

    @property
    def is_plain_lora(self) -> bool:
        """Whether it is LoRA of modules; bare parameters, as of experts, have factors of other shapes."""
        return self.method == "LORA" and not self.config.get("target_parameters")

    @functools.cached_property
    def keys(self) -> list[Key]:
        """Every key, taken apart, in the order of the file."""
        bias = self.config.get("bias") == "all"
        saved = self.listed("modules_to_save")
        keys = [taken_apart(text, bias=bias) for text in self.weights.shapes]
        trained = set(matching(saved, [key.module for key in keys])) if saved else set()
        return [
            Key(key.text, key.module, key.part, Kind.SAVED) if key.kind is Kind.BIAS and key.module in trained else key
            for key in keys
        ]

    def of(self, *kinds: Kind) -> list[Key]:
        """The keys of these kinds."""
        return [key for key in self.keys if key.kind in kinds]

    @functools.cached_property
    def layers(self) -> dict[str, dict[str, str]]:
        """Module -> part -> key, for the modules that have an update of their own."""
        found: dict[str, dict[str, str]] = {}
        for key in self.of(Kind.FACTOR, Kind.START, Kind.MAGNITUDE, Kind.BIAS, Kind.METHOD):
            if key.module or not key.part.startswith("vera_"):  # VeRA's factors belong to no module
                found.setdefault(key.module, {})[key.part] = key.text
        return {module: parts for module, parts in found.items() if parts.keys() != {"bias"}}

    def shape(self, module: str, part: str) -> tuple[int, ...] | None:
        """Shape of one part of a layer's adapter; None if it has none."""
        key = self.layers[module].get(part)
        return None if key is None else self.weights.shapes[key]

    def listed(self, option: str) -> list[str]:
        """The entries of an option that is a list of names; none if it is anything else."""
        value = self.config.get(option)
        return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """The rank that the configuration gives to each layer."""
        return {module: int(value) for module, value in self._values("rank_pattern", 0).items()}

    @functools.cached_property
    def scalings(self) -> dict[str, float]:
        """What each layer's update is multiplied with; empty for a method that has no such factor."""
        alphas = self._values("alpha_pattern", 1)
        root = self.config.get("use_rslora") is True
        return {
            module: alphas[module] / (math.sqrt(rank) if root else rank)
            for module, rank in self.ranks.items()
            if rank > 0
        }

    def _values(self, table: str, which: int) -> dict[str, float]:
        if self.method not in RANKS:
            return {}
        option = RANKS[self.method][which]
        default = self.config.get(option, 12 if option == "init_r" else 8)
        patterns = self.config.get(table)
        if not isinstance(patterns, Mapping) or self.method == "ADALORA":
            patterns = {}  # AdaLoRA's table says which components are left, not how many there were
        found = first_keys(patterns, list(self.layers), table)
        values = {name: patterns[found[name]] if name in found else default for name in self.layers}
        if not all(isinstance(value, int | float) and abs(value) <= MAX_NUMBER for value in values.values()):
            raise CheckpointError(f"{self.directory / CONFIG_FILE}: a rank or an alpha is no number, or far too large.")
        return values

    def not_selected(self) -> list[str]:
        """The layers that ``target_modules`` and its companions do not select; none if only a model could tell."""
        targets = self.config.get("target_modules")
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            return []
        # Bare parameters are found by another option.
        names = [] if self.config.get("target_parameters") else list(self.layers)
        chosen = self.selected("target_modules", names) - self.selected("exclude_modules", names)
        # nn.MultiheadAttention is adapted with its `out_proj`, which no option names.
        return [
            name for name in names if name not in chosen and name.removesuffix(".base_layer.out_proj") not in chosen
        ]

    def selected(self, option: str, names: list[str]) -> set[str]:
        """The names that an option selects: a regular expression, or a list of suffixes."""
        value = self.config.get(option)
        return set(selected(value if isinstance(value, str) else self.listed(option), names, option))


def read_contents(directory: Path) -> Contents:
    """Read the configuration and the header of the weights.

    Raises:
        CheckpointError: there is no file of weights in safetensors, or one is hostile or damaged.
    """
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory} is not a directory; an adapter is a directory with {CONFIG_FILE}.")
    with reading(directory):
        names = sorted(local_names(directory))
        found = next((name for name in FILES if name in names), None)
        if found is None:
            pickles = pickles_in(names)
            fix = f" {shown(pickles)} is a pickle, which is never read here; minipeft convert makes safetensors of it."
            raise CheckpointError(
                f"{directory} has none of {', '.join(FILES)}.{fix if pickles else folder_named(names)}"
            )
        stored = read_object(directory / CONFIG_FILE) if CONFIG_FILE in names else {}
        return Contents(directory, in_todays_words(stored), open_tensors(directory / found), stored)
