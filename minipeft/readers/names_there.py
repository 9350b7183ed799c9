"""The names that modules have in other programs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from minipeft.errors import CheckpointError
from minipeft.readers.names import Reader

# Start of a name in transformers 5 -> its start there. vLLM maps the names of transformers itself, and SGLang looks at the
# number of the layer only.
STARTS = {
    # The script knows the names of the language model alone.
    Reader.LLAMA_CPP: {"model.language_model.": "model.", "language_model.model.": "model."},
    # mlx_lm/models/gemma3.py, qwen2_vl.py, qwen3_vl.py, mistral3.py
    Reader.MLX: {"model.language_model.": "language_model.model."},
}
# What a module of a pipeline's part is in -> that part.
COMPONENTS = {
    "down_blocks": "unet",
    "up_blocks": "unet",
    "mid_block": "unet",
    "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer",
    "joint_transformer_blocks": "transformer",
    "blocks": "transformer",
    "text_model": "text_encoder",
}


def renamed_for(reader: Reader, module: str) -> str:
    """The name of a module in another program."""
    for start, other in STARTS.get(reader, {}).items():
        if module.startswith(start):
            return other + module.removeprefix(start)
    return module


def component_of(modules: Collection[str], directory: Path) -> str:
    """The part of a diffusers pipeline that has modules of these names.

    Raises:
        CheckpointError: none has, or several have.
    """
    found = {COMPONENTS.get(module.partition(".")[0]) for module in modules}
    only = next(iter(found)) if len(found) == 1 else None
    if only is None:
        raise CheckpointError(
            f"{directory}: {min(modules)!r} does not say which part of a diffusers pipeline it is in. diffusers reads adapters "
            f"of models whose modules start with {', '.join(COMPONENTS)}."
        )
    return only
