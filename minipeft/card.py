"""The model card beside an adapter, written through ``huggingface_hub``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from minipeft.files import write_files

CARD_FILE = "README.md"
MARK = "<!-- written by minipeft; remove this line to keep your own text -->"
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def write_card(directory: Path, config: Mapping[str, Any], parameters: int) -> None:
    """Write ``README.md`` unless somebody's own stands there. A local path as base is not published in it.

    Args:
        directory: the adapter's.
        config: the contents of ``adapter_config.json``.
        parameters: number of saved parameters.
    """
    target = directory / CARD_FILE
    if target.exists() and MARK not in target.read_text("utf-8", errors="replace"):
        return
    base = config.get("base_model_name_or_path")
    public = isinstance(base, str) and not Path(base).exists() and not Path(base).is_absolute()
    method = str(config["peft_type"]).lower()
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if public else {}
    data = ModelCardData(
        library_name="peft",  # the format is PEFT's, and this makes the hub show how to load it
        base_model=base if public else None,
        tags=["minipeft", method, *([f"base_model:adapter:{base}"] if public else [])],
        pipeline_tag=PIPELINES.get(str(config.get("task_type"))),
        **relation,
    )
    options = "\n".join(
        f"| `{key}` | `{config[key]}` |"
        for key in ("r", "lora_alpha", "target_modules", "lora_dropout")
        if key in config
    )
    card = ModelCard(
        f"---\n{data.to_yaml()}\n---\n{MARK}\n\n# {method.upper()} adapter\n\n{parameters:,} parameters, in PEFT's format.\n\n"
        f"| option | value |\n|---|---|\n{options}\n\n"
        '```python\nimport minipeft\n\nmodel = minipeft.load_adapter(base_model, "path/to/this/directory")\n```\n'
    )
    write_files(directory, {CARD_FILE: str(card).encode("utf-8")})
