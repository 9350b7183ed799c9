"""The files of an adapter as one reader wants them: its format, and its names of modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from minipeft.errors import CheckpointError
from minipeft.files.file_names import CONFIG_FILE, DIFFUSERS_FILE, MLX_FILE, WEIGHTS_FILE
from minipeft.files.readers.names import Reader
from minipeft.files.readers.plain import Pair
from minipeft.files.save import config_text

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


@dataclass
class Made:
    """What was done to make an adapter that a reader takes."""

    files: dict[str, bytes] = field(default_factory=dict)  # by name, the weights last
    done: list[str] = field(default_factory=list)  # what was changed, a sentence each
    dropped: list[str] = field(default_factory=list)  # keys that were left out, because that was asked for


def factors(pairs: Mapping[str, Pair], prefix: str) -> dict[str, Tensor]:
    """The tensors of pairs by PEFT's keys, with this before the module's name."""
    tensors: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        A, B = ("lora_embedding_A", "lora_embedding_B") if pair.is_embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{prefix}{module}.{A}": pair.down, f"{prefix}{module}.{B}": pair.up}
    return tensors


def write_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any], made: Made) -> None:
    """PEFT's two files."""
    made.files[CONFIG_FILE] = config_text(config)
    made.files[WEIGHTS_FILE] = _saved(tensors)


def write_mlx(pairs: Mapping[str, Pair], made: Made) -> None:
    """mlx-lm's two files; raises CheckpointError for a convolution."""
    first = next(iter(pairs.values()))
    others = [module for module, pair in pairs.items() if pair.down.ndim != 2]
    if others:
        raise CheckpointError(f"{others[0]} is a convolution, which mlx-lm does not adapt. Merge it: minipeft merge.")
    tensors = {f"{module}.lora_a": pair.down.T for module, pair in pairs.items()}
    tensors |= {f"{module}.lora_b": pair.up.T for module, pair in pairs.items()}
    own = {"rank": first.rank, "scale": first.scaling, "dropout": 0.0, "keys": sorted(pairs)}
    # The keys are whole names, so that the number of layers decides nothing.
    made.files[CONFIG_FILE] = config_text({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": own})
    made.files[MLX_FILE] = _saved(tensors)


def renamed_for(reader: Reader, module: str) -> str:
    """The name of a module in another program."""
    for start, other in STARTS.get(reader, {}).items():
        if module.startswith(start):
            return other + module.removeprefix(start)
    return module


def write_diffusers(pairs: Mapping[str, Pair], directory: Path, made: Made) -> None:
    """The file of a diffusers pipeline; raises CheckpointError if it is not clear for which part of one."""
    # Modules in blocks say it for the ones beside them.
    components = {COMPONENTS[first] for module in pairs if (first := module.partition(".")[0]) in COMPONENTS}
    if len(components) != 1:
        raise CheckpointError(
            f"{directory}: {min(pairs)!r} does not say which part of a diffusers pipeline it is in. diffusers reads adapters "
            f"of models whose modules start with {', '.join(COMPONENTS)}."
        )
    component = components.pop()
    # Without an alpha in the file diffusers multiplies with 1, so the scaling goes into B.
    made.files[DIFFUSERS_FILE] = _saved(factors({m: pair.scaled(1.0) for m, pair in pairs.items()}, f"{component}."))
    made.done.append(f"The keys are those of a pipeline's {component}.")


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({key: t.contiguous() for key, t in sorted(tensors.items())}, {"format": "pt"})
