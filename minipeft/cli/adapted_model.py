"""An adapter on its base, both loaded from disk or the hub, and something to run it on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.errors import CheckpointError, ConfigError, DataError
from minipeft.files.empty_model import GENERATING, HEADS
from minipeft.files.format import AdapterFile, open_adapter
from minipeft.files.hub import adapter_directory, base_directory
from minipeft.files.readers.tries import any_batch, base_model
from minipeft.files.reading import read_text
from minipeft.files.tokenizer import load_tokenizer
from minipeft.model import AdaptedModel, load_adapter

LONGEST = 512  # tokens of a text
CLASSIFIERS = (".classifier.", ".score.")


@dataclass(frozen=True)
class Loaded:
    """An adapted model, and the directories that it came from."""

    model: AdaptedModel
    directory: Path
    base: Path


def adapted_model(directory: str, base: str | None) -> Loaded:
    """Load an adapter on its base, in the base's own dtype.

    If the file has too few keys or too many, what fits is loaded: to say so is for the caller.

    Raises:
        MinipeftError: there is no such adapter or base, or they do not belong together.
    """
    place = adapter_directory(directory)
    file = open_adapter(place)
    named = base or file.config.base_model_name_or_path
    if not named:
        raise ConfigError(f"{directory} does not name its base model; give it with --base.")
    folder = base_directory(named)
    task = file.config.task_type or ""
    head = None if task in GENERATING else HEADS.get(task)  # which the base's checkpoint may lack
    options: dict[str, Any] = {"dtype": "auto"}
    if head is not None and (labels := _labels(file)):
        options["num_labels"] = labels
    model = base_model(folder, head, **options)
    with warnings.catch_warnings():  # what they are about is what the caller looks for
        warnings.simplefilter("ignore")
        try:
            return Loaded(load_adapter(model, place).eval(), place, folder)
        except CheckpointError as refusal:
            try:
                return Loaded(load_adapter(model, place, strict=False).eval(), place, folder)
            except CheckpointError:
                raise refusal from None


def batch_of(found: Loaded, text: Path | None) -> tuple[Mapping[str, Any], Any]:
    """A batch and the base's tokenizer: the text's tokens with labels, or, without a text, tokens at random and None.

    Raises:
        DataError: the text cannot be read or is empty, or the base has no tokenizer for it.
    """
    if text is None:
        return any_batch(found.model), None
    words = read_text(text)
    tokenizer = load_tokenizer(found.directory if (found.directory / "tokenizer_config.json").exists() else found.base)
    longest = getattr(found.model.config, "max_position_embeddings", None) or LONGEST
    rows = dict(tokenizer(words, return_tensors="pt", truncation=True, max_length=min(longest, LONGEST)))
    if not rows["input_ids"].numel():
        raise DataError(f"there are no tokens in {text}.")
    generates: Any = getattr(found.model, "can_generate", None)
    labels = {"labels": rows["input_ids"].clone()} if callable(generates) and generates() else {}
    return {**rows, **labels}, tokenizer


def _labels(file: AdapterFile) -> int | None:
    """How many labels the last layer of the head in a file has."""
    shapes = [
        s
        for key, s in file.shapes.items()
        if any(h in key for h in CLASSIFIERS) and key.endswith(".weight") and "lora" not in key
    ]
    return shapes[-1][0] if shapes else None
