"""The model card of an adapter, written with ``huggingface_hub``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from minipeft.errors import CheckpointError
from minipeft.files.atomic import write_files
from minipeft.files.reading import read_limited, reading

CARD_FILE, MAX_CARD_BYTES = "README.md", 2**24
MARK = "<!-- written by minipeft; remove this line to keep your own text -->"
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def public_base(config: Mapping[str, Any]) -> str | None:
    """The base model's name on the hub; None if the configuration names a place on this machine, or nothing."""
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and is_repo_id(base) and not os.path.exists(base) else None


def is_repo_id(text: str) -> bool:
    """Whether this can be the name of a repository on the hub, ``owner/name`` or an old ``name``."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    base, pipeline = public_base(config), PIPELINES.get(str(config.get("task_type")))
    tags = ["minipeft", str(config["peft_type"]).lower()]
    facts: dict[str, Any] = {"library_name": "peft"}  # the format is PEFT's, so the hub shows how to load it
    if base is not None:
        tags.append(f"base_model:adapter:{base}")
        facts |= {"base_model": base, "base_model_relation": "adapter"}
    return {**facts, "tags": tags, **({"pipeline_tag": pipeline} if pipeline else {})}


def update_card(directory: Path, config: Mapping[str, Any]) -> None:
    """Tell the hub, in a card that something else wrote, that this is an adapter, and of which base.

    Its text and tags stay.
    """
    text = read_limited(directory / CARD_FILE, MAX_CARD_BYTES).decode("utf-8", errors="replace")
    with reading(directory / CARD_FILE):
        card = ModelCard(text, ignore_metadata_errors=True)
        facts = _facts(config)
        facts["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *facts["tags"]]))
        for key, value in facts.items():
            card.data[key] = value
    write_files(directory, {CARD_FILE: str(card).encode("utf-8")})


def _is_ours(card: Path) -> bool:
    try:
        return MARK.encode() in read_limited(card, MAX_CARD_BYTES)
    except CheckpointError:  # what cannot be read is somebody else's
        return False


def card_to_write(directory: Path, config: Mapping[str, Any], parameters: int) -> dict[str, bytes]:
    """``README.md`` by its name, without a local path of the base; empty if somebody has written one."""
    if os.path.exists(directory / CARD_FILE) and not _is_ours(directory / CARD_FILE):
        return {}
    method = str(config["peft_type"]).lower()
    data = ModelCardData(**_facts(config))
    options = "\n".join(
        f"| `{key}` | `{config[key]}` |"
        for key in ("r", "lora_alpha", "target_modules", "lora_dropout")
        if key in config
    )
    card = (
        f"---\n{data.to_yaml()}\n---\n{MARK}\n\n# {method.upper()} adapter\n\n{parameters:,} parameters, in PEFT's format.\n\n"
        f"| option | value |\n|---|---|\n{options}\n\n"
        '```python\nimport minipeft\n\nmodel = minipeft.load_adapter(base_model, "path/to/this/directory")\n```\n'
    )
    return {CARD_FILE: card.encode("utf-8")}
