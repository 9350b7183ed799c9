"""The readers by name. It imports nothing, so that a command can list them before torch is imported."""

from __future__ import annotations

import enum


class Reader(str, enum.Enum):
    """A program that reads adapters."""

    PEFT = "peft"
    TRANSFORMERS = "transformers"
    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMA_CPP = "llama.cpp"
    MLX = "mlx"
    DIFFUSERS = "diffusers"


class Part(str, enum.Enum):
    """What an adapter may hold besides its updates, and may be left without."""

    MODULES_TO_SAVE = "modules_to_save"
    TOKENS = "tokens"
    HEAD = "head"
